"""The nouns of foredraft: what a request is, what a drafter guesses, what verification decides, what a step returns.

Plain data, validated where it is built. Knows nothing of models, caches, files or text.
"""

import enum
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

import torch

from foredraft.errors import RequestError
from foredraft.habits import SAMPLING, by_our_names
from foredraft.native.choosing import Follower
from foredraft.stats import SpecStats
from foredraft.steering import Processor, Stateful, Steering, check_processors
from foredraft.structured import Constraint, Structured

FinishReason = Literal["stop", "length", "abort", "error"]
VerifierName = Literal["coupled", "rejection"]
StopRule = Callable[[int], bool]
"""Called once for each token as it is committed, in order; True ends the request with this token."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens of one request for one step.

    `parents[i]` is the index of token i's predecessor within the draft, -1 for the last committed token; empty means a
    chain. `probs` is the distribution each token was really drawn from; `None` says one-hot (an argmax, a lookup).
    """

    tokens: tuple[int, ...] = ()
    source: str = "none"
    probs: torch.Tensor | None = None  # [n, V], after the request's processors
    parents: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()  # the drafter's own probability of each token; what policies learn from

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether each token follows the one before it."""
        return not self.parents or self.parents == tuple(range(-1, len(self.tokens) - 1))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the target made of a draft: indices kept (a root-to-node path), and the token that follows them."""

    accepted: tuple[int, ...]
    next_token: int
    kind: Literal["recovered", "bonus"]


@by_our_names(SAMPLING)
@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the target's distribution becomes text. The defaults decode greedily.

    Penalties follow vLLM: `repetition_penalty` looks at prompt and output, `presence_penalty` and `frequency_penalty`
    at the output alone. `top_k=0`, `top_p=1`, `min_p=0` switch a filter off.

    `processors` are called as transformers calls them, with ids [1, n] and scores [1, V], for every prefix that a draft
    makes possible. Each must be a function of these two; one that keeps a state (counts calls, follows an automaton) is
    given as `Stateful(make)`. A processor that shows a state all the same ends its request with an ExactnessError.

    `structured` is the form the output must have: a JSON schema (a dict or a pydantic model), or what
    `Structured.json_schema`, `.regex`, `.choice` or `.grammar` make. Needs the extra `structured`.

    Raises:
        RequestError: a value is out of range, or two values contradict each other.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; 0: of the chosen token; n: also of the n most likely
    processors: tuple[Processor | Stateful, ...] = ()
    verifier: VerifierName = "coupled"
    structured: Structured | Mapping[str, Any] | type | None = None  # a Structured once built

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "processors"):
            value = getattr(self, name)
            alone = isinstance(value, str) or not isinstance(value, Iterable)
            object.__setattr__(self, name, (value,) if alone else tuple(value))
        checks = (
            ("temperature", _number(self.temperature, 1e-7) or self.temperature == 0, "0 (greedy) or more (1e-7)"),
            ("top_k", is_whole(self.top_k, 0), "0 (off) or more, and whole"),
            ("top_p", _number(self.top_p, 1e-9, 1), "in (0, 1]"),
            ("min_p", _number(self.min_p, 0, 1), "in [0, 1]"),
            ("repetition_penalty", _number(self.repetition_penalty, 1e-6, 1e6), "more than 0 (1e-6 to 1e6); 1 is off"),
            ("presence_penalty", _number(self.presence_penalty, -2, 2), "in [-2, 2]"),
            ("frequency_penalty", _number(self.frequency_penalty, -2, 2), "in [-2, 2]"),
            ("logit_bias", _biases(self.logit_bias), "a dict of token ids and finite numbers (or -inf)"),
            ("max_new_tokens", is_whole(self.max_new_tokens, 1), "1 or more, and whole"),
            ("seed", self.seed is None or is_whole(self.seed, 0, 2**63 - 1), "None or whole, in [0, 2**63)"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "non-empty strings"),
            ("stop_token_ids", all(is_whole(token, 0) for token in self.stop_token_ids), "token ids"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "True or False"),
            ("logprobs", self.logprobs is None or is_whole(self.logprobs, 0, 100), "None or whole, in [0, 100]"),
            ("processors", all(map(_processes, self.processors)), "LogitsProcessors or Stateful(make)"),
            ("verifier", self.verifier in ("coupled", "rejection"), "'coupled' or 'rejection'"),
        )
        for name, valid, wanted in checks:
            if not valid:
                raise RequestError(f"{name}={getattr(self, name)!r} is not usable; it must be {wanted}")
        check_processors(self.processors)
        if self.structured is not None:
            object.__setattr__(self, "structured", Structured.of(self.structured))
            if self.ignore_eos:
                raise RequestError("ignore_eos contradicts structured: the output ends where its form is complete")
        filters = [name for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)) if getattr(self, name) != off]
        if self.greedy and filters:
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in filters)
            raise RequestError(f"temperature=0 (greedy) contradicts {given}; set a temperature or drop the filter")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken (temperature 0)."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether the scores of a position depend on the tokens before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def only_draws(self) -> bool:
        """Whether nothing but temperature, filters, noise and perhaps a form decides: the target's token is drawn from
        its raw logits."""
        changed = self.logit_bias or self.penalises or self.processors
        return not changed and (self.greedy or self.verifier == "coupled")


def is_whole(value: object, least: int, most: float = math.inf) -> bool:
    """Whether it is a whole number within these bounds; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def _number(value: object, least: float, most: float = sys.float_info.max) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and bool(least <= value <= most)  # type: ignore[operator]  # all have an order


def _processes(value: object) -> bool:
    return isinstance(value, Stateful) or callable(value)


def _biases(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        is_whole(token, 0) and (_number(bias, -sys.float_info.max) or bias == -math.inf)
        for token, bias in value.items()
    )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities under the model's unprocessed distribution at one position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Phase(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False, weakref_slot=True)
class Request:
    """One request's whole state. `token_ids` are committed; the target's cache holds the first `cached` of them."""

    token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_rule: StopRule
    num_draft_tokens: int | None = None  # None: as the policy decides; 0: plain decoding
    drafter: str | None = None  # of several drafters the one to use; None: as the policy chooses
    may_draft: bool = True  # False once a guess has spoilt its logits
    stop_token_ids: frozenset[int] = frozenset()  # the request's own, and the model's unless they are ignored
    memory: str | None = ""  # whose outputs it drafts from, and whose keys and values it shares; None: nobody's
    started: float = 0.0  # perf_counter at its first step
    arrived: float = 0.0  # perf_counter when it was submitted
    draft_limit: int = 0  # the most tokens that a drafter may propose in this step
    prompt_len: int = -1
    slot: int = -1
    cached: int = 0
    phase: Phase = Phase.WAITING
    finish_reason: FinishReason | None = None
    error: Exception | None = None  # what went wrong, where `finish_reason` is "error"
    from_draft: list[bool] = field(default_factory=list)  # one for each output token
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    stats: SpecStats = field(default_factory=SpecStats)
    constraint: InitVar[Constraint | None] = None
    steering: Steering = field(init=False)
    follower: Follower | None = None  # what draws its tokens, once that has been needed
    lead: tuple[int, ...] = ()  # forced tokens, with which every draft of this step begins
    reach: int = 0  # up to which token of its prompt this step computes

    def __post_init__(self, constraint: Constraint | None) -> None:
        if self.params.structured is not None and constraint is None:
            raise RequestError("structured output needs a constraint made for this vocabulary, as LLM makes it")
        self.steering = Steering(self.params.processors, constraint)
        self.prompt_len = len(self.token_ids) if self.prompt_len < 0 else self.prompt_len
        self.stats.prompt_tokens = self.prompt_len

    @property
    def output_ids(self) -> list[int]:
        """The tokens after the prompt."""
        return self.token_ids[self.prompt_len :]

    @property
    def num_output(self) -> int:
        """How many tokens there are after the prompt."""
        return len(self.token_ids) - self.prompt_len

    @property
    def remaining(self) -> int:
        """How many more tokens `max_new_tokens` allows."""
        return self.params.max_new_tokens - self.num_output

    @property
    def decoding(self) -> bool:
        """Whether the prompt is in the cache, so that only the newest token is left to compute."""
        return len(self.token_ids) - self.cached == 1


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The tokens one step added to one request."""

    request: Request
    token_ids: tuple[int, ...]
    from_draft: tuple[bool, ...]
    finish_reason: FinishReason | None
    source: str = "none"  # who drafted what this step checked
