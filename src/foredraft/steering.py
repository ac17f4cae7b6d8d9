"""What steers one request's text beside its numbers: logits processors, with the state some keep, and a constraint.

A verification pass asks about several prefixes at once, some of which the text never takes. Processors that are
functions of their arguments do not mind. Those with a state get a copy for each prefix, and only the copies of prefixes
that were kept live on. Knows nothing of models and drafts.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor

from foredraft.errors import ExactnessError, RequestError
from foredraft.structured import Constraint
from foredraft.structured.mask import only

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
KNOWN_STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
CHECK_EVERY = 8  # passes between two spot checks of processors, after the first few


@dataclass(frozen=True, slots=True)
class Stateful:
    """A logits processor that keeps a state: `make()` gives each request a fresh one.

    It is called once for each token of the text, in order. For drafts it needs a method `copy()` that returns an
    independent processor in the same state; without one the request is decoded without drafts.
    """

    make: Callable[[], Processor]

    def __post_init__(self) -> None:
        if not callable(self.make):
            raise RequestError(f"Stateful({self.make!r}) is not usable; give a function that makes a processor")


class Sample(NamedTuple):
    """A question that a processor has answered."""

    processor: Processor
    ids: torch.Tensor  # [1, n]
    scores: torch.Tensor  # [1, V]
    answer: torch.Tensor  # [1, V]


class Steering:
    """One request's processors and constraint while it runs.

    `ahead[d]` are the processors as they are before they judge the token after d guesses. Processors that keep no state
    are the same object everywhere.
    """

    def __init__(self, processors: Sequence[Processor | Stateful] = (), constraint: Constraint | None = None) -> None:
        self.constraint = constraint
        self.stateful = [isinstance(processor, Stateful) for processor in processors]
        self.ahead = [[p.make() if isinstance(p, Stateful) else p for p in processors]]
        self.watched = False  # whether to spot-check the processors that should have no state
        self.passes = 0
        self.first: list[Sample] = []
        self.latest: list[Sample] = []

    @property
    def active(self) -> bool:
        return bool(self.stateful) or self.constraint is not None

    @property
    def follows_drafts(self) -> bool:
        """Whether guesses can be judged now: every state can be copied, and looking ahead is not too dear."""
        if self.constraint is not None and self.constraint.dear:
            return False
        if not self.stateful:
            return True
        return all(hasattr(p, "copy") for p, stateful in zip(self.ahead[0], self.stateful, strict=True) if stateful)

    def mind(self, *, drafts: bool) -> None:
        """Where drafts may come: watch for processors with a hidden state, say so where one cannot follow drafts."""
        self.watched = drafts and self.follows_drafts
        if drafts and not self.follows_drafts:
            warnings.warn(
                "a Stateful processor without copy() cannot follow drafts: this text is decoded without them; give the "
                "processor a method copy() that returns it in the same state, or pass num_draft_tokens=0",
                RuntimeWarning,
                stacklevel=3,
            )

    def apply(self, scores: torch.Tensor, prefix: Sequence[int], paths: Sequence[Sequence[int]]) -> torch.Tensor:
        """Row i judges the token after `prefix + paths[i]`. # [n, V] -> [n, V] float32, a copy"""
        if self.stateful:
            pairs = zip(scores, paths, strict=True)
            scores = torch.cat([self._process(row, [*prefix, *path], len(path)) for row, path in pairs])
        if self.constraint is not None:
            scores = only(scores, self.constraint.allowed_after(paths))
        return scores

    def commit(self, tokens: Sequence[int], *, ended: bool) -> None:
        """These tokens were kept; all prefixes after others are forgotten.

        Raises:
            ExactnessError: a processor has shown a state that it was not said to have.
        """
        if self.constraint is not None:
            self.constraint.commit(tokens)
        if not self.stateful:
            return
        self.ahead = [self.ahead[min(len(tokens), len(self.ahead) - 1)]]
        self._spot_check(ended)

    def _process(self, row: torch.Tensor, prefix: list[int], depth: int) -> torch.Tensor:
        """The row after every processor, with its own prefix; they may write into what they get. # [V] -> [1, V]"""
        ids = torch.tensor([prefix], device=row.device)
        scores = row.clone().unsqueeze(0)
        sampled = self._due and depth == 0
        samples = []
        for processor, stateful in zip(self._after(depth), self.stateful, strict=True):
            before = scores.clone() if sampled else scores
            scores = _call(processor, ids, scores)
            if sampled and not stateful:
                samples.append(Sample(processor, ids, before, scores.clone()))
        if sampled:
            self.latest = samples
        return scores.float()

    def _after(self, depth: int) -> list[Processor]:
        """The processors to judge the token after `depth` guesses; what they learn by that stays with this prefix."""
        if any(self.stateful):
            del self.ahead[depth + 1 :]
            self.ahead.append([_fork(p) if s else p for p, s in zip(self.ahead[-1], self.stateful, strict=True)])
        return self.ahead[-1]

    @property
    def _due(self) -> bool:
        often = self.passes & (self.passes - 1) == 0  # 0, 1, 2, 4
        return self.watched and (often or self.passes % CHECK_EVERY == 0)

    def _spot_check(self, ended: bool) -> None:
        """Ask about the first and the latest prefix again, now and then and at the end."""
        if self._due or (self.watched and ended):
            self.first = self.first or self.latest
            for sample in (*self.first, *self.latest):
                _ask_again(sample)
        self.passes += 1


def _fork(processor: Any) -> Processor:
    """A copy to go on from; the processor itself where it has none, which then judges every token once."""
    copied: Processor = processor.copy() if hasattr(processor, "copy") else processor
    return copied


def _call(processor: Processor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    name, shape = _name(processor), scores.shape
    try:
        changed = processor(ids, scores)
    except AssertionError as error:
        said = str(error) or "no message"
        raise RequestError(
            f"processor {name} failed an assertion after {ids.shape[1]} tokens ({said}); one that "
            "keeps a state serves one text only: pass LLM Stateful(make), which makes one for each"
        ) from error
    if not isinstance(changed, torch.Tensor):
        raise RequestError(f"{name} returned {type(changed).__name__}; return the scores, [1, {shape[1]}]")
    if changed.shape != shape:
        raise RequestError(f"{name} returned shape {tuple(changed.shape)}; return [1, {shape[1]}], as it came")
    return changed


def _ask_again(sample: Sample) -> None:
    processor, ids, scores, answer = sample
    try:
        again = processor(ids, scores.clone())
        same = torch.equal(again.nan_to_num(), answer.nan_to_num())
        cause = None
    except Exception as error:  # a matcher that has moved on may raise anything
        same, cause = False, error
    if not same:
        raise ExactnessError(
            f"processor {_name(processor)} answers differently when asked twice about the same {ids.shape[1]} tokens, "
            "so it keeps a state, and with drafts it judges prefixes that the text never takes; make it a function of "
            "its arguments, pass LLM Stateful(make) in its place, or decode without drafts"
        ) from cause


def _name(processor: Processor) -> str:
    return str(getattr(processor, "label", type(processor).__name__))


def check_processors(processors: Sequence[object]) -> None:
    """Raises RequestError for a processor that is known to keep a state and is not given as `Stateful`."""
    for processor in processors:
        if isinstance(processor, KNOWN_STATEFUL):
            name = _name(processor)
            raise RequestError(f"processor {name} keeps a state; give each text its own: Stateful(lambda: {name}(...))")
