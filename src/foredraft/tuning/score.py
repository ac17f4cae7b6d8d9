"""A drafter's acceptance on the calibration text, by teacher forcing: no candidate has to generate.

The cache holds the target's keys and values of every sample, one slot each. A self-drafter reads the *target's* keys
and values for what is committed, and its own only for what it drafts. So it is scored in blocks as long as a draft, all
samples at once, **from the last block to the first**: a block overwrites the target's rows at its own positions, and
the passes that follow only read earlier ones. At the end the target's rows are put back. A draft model has its own
cache and is scored in one pass from the beginning; a drafter without a model is asked for a draft at every position.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from foredraft import sampling
from foredraft.drafters.base import Drafter
from foredraft.models.base import CausalModel
from foredraft.models.rows import SHORT_SPAN, Span, plan
from foredraft.policy import Fixed
from foredraft.scores import adjust, probabilities, restrict
from foredraft.tuning.acceptance import Acceptance, run_lengths
from foredraft.tuning.calibration import CalibrationText
from foredraft.tuning.forecast import MAX_GAMMA
from foredraft.types import Request

KEY_MULTIPLE = 128
CHUNK = 256
KEPT = 4096  # largest probabilities of a position; those of a larger vocabulary beyond it are next to nothing
DEPTH = 8  # rows of a block: a draft's keys are its own that far back


class Tally:
    """Which rows agreed with the text, by sample and by where the row's block began."""

    def __init__(self, samples: int) -> None:
        self.blocks: list[dict[int, list[bool]]] = [{} for _ in range(samples)]
        self.rows = 0
        self.overlap = 0.0

    def add(self, blocks: Mapping[int, tuple[int, int]], agrees: Sequence[bool], overlap: float) -> None:
        first = 0
        for k, (offset, length) in blocks.items():
            self.blocks[k][offset] = list(agrees[first : first + length])
            first += length
        self.rows += len(agrees)
        self.overlap += overlap

    @property
    def alpha(self) -> float:
        return self.overlap / max(1, self.rows)

    def joined(self) -> Acceptance:
        """Acceptance if each position was looked at once; runs may go on from one block into the next."""
        agree = [[hit for offset in sorted(found) for hit in found[offset]] for found in self.blocks]
        return Acceptance(run_lengths(agree), self.alpha, MAX_GAMMA)

    def exact(self, depth: int) -> Acceptance:
        """Acceptance if a block began at every position: what a draft from there would really have given."""
        runs = tuple(tuple(_leading(found[offset]) for offset in sorted(found)) for found in self.blocks)
        return Acceptance(runs, self.alpha, depth)


class Scorer:
    """Scores drafters for one target on one calibration text.

    Uses the target's cache until `close`, which frees it; nothing may generate in between. With a temperature, a draft
    token is drawn with the sample's own noise, as for the coupled verifier, and alpha is E[sum min(p, q)] after
    temperature and filters. At temperature 0 a draft token is the argmax, and alpha the share of equal argmaxes.
    """

    def __init__(self, target: CausalModel, calibration: CalibrationText) -> None:
        self.target = target
        self.samples = calibration.samples
        self.params = calibration.params
        self.starts = [sample.prompt_len for sample in self.samples]  # of the row after the first output token
        self.counts = [sample.num_output - 1 for sample in self.samples]  # positions where a draft may begin
        self.firsts = list(itertools.accumulate(self.counts, initial=0))  # of each sample in `ids` and `probs`
        self.ids = self.probs = torch.empty(0)  # [positions, KEPT], the target's distributions when sampling
        prefill(target, [sample.token_ids for sample in self.samples])
        if not self.params.greedy:
            self.ids, self.probs = self._distributions()
        self.pristine = [layer.clone() for layer in target.cache.storage]

    def close(self) -> None:
        self.pristine.clear()
        self.target.cache.release()

    def score(self, model: CausalModel, *, depth: int = DEPTH, exact: bool = False) -> Acceptance:
        """Acceptance of a self-drafter: `model` computes with the target's cache.

        With `exact` a block begins at every position: `depth` times the work, and run lengths are those of real drafts.
        Otherwise each position is looked at once, and runs are joined across blocks.
        """
        assert model.cache is self.target.cache, "a self-drafter shares the target's cache"
        found = Tally(len(self.samples))
        with torch.inference_mode():
            try:
                for offset in self._offsets(1 if exact else depth):
                    self._forward(model, self._blocks(offset, depth), found)
            finally:  # also when the user interrupts
                self._restore()
        return found.exact(depth) if exact else found.joined()

    def score_model(self, model: CausalModel) -> Acceptance:
        """Acceptance of a draft model with its own cache; beyond the end of its context nothing is accepted."""
        found = Tally(len(self.samples))
        prefill(model, [s.token_ids[: s.prompt_len][: model.max_positions] for s in self.samples])
        with torch.inference_mode():
            for offset in range(0, max(self.counts), SHORT_SPAN):
                blocks = {
                    k: (start, min(length, model.max_positions - self.starts[k] - start))
                    for k, (start, length) in self._blocks(offset, SHORT_SPAN).items()
                }
                self._forward(model, {k: block for k, block in blocks.items() if block[1] > 0}, found)
        model.cache.release()
        return found.joined()

    def score_drafter(self, drafter: Drafter, depth: int = MAX_GAMMA) -> Acceptance:
        """Acceptance of any drafter: it is asked for a draft after every token of the text."""
        runs: list[tuple[int, ...]] = []
        offers: list[tuple[int, ...]] = []
        for slot, sample in enumerate(self.samples):
            request = Request(list(sample.prompt), self.params, sample.seed, _never, slot=slot)
            asked = [self._ask(drafter, request, sample.token_ids, depth) for _ in range(sample.num_output - 1)]
            drafter.forget(request)
            runs.append(tuple(run for run, _ in asked))
            offers.append(tuple(offer for _, offer in asked))
        first = [
            run > 0 for row, offer in zip(runs, offers, strict=True) for run, n in zip(row, offer, strict=True) if n
        ]
        return Acceptance(tuple(runs), sum(first) / len(first) if first else 0.0, depth, tuple(offers))

    def _ask(self, drafter: Drafter, request: Request, text: Sequence[int], depth: int) -> tuple[int, int]:
        """Append one more token of the text and ask for a draft: how many of its tokens are right, and its length."""
        request.token_ids.append(text[len(request.token_ids)])
        request.draft_limit = depth
        tokens = drafter.propose([request], Fixed(depth))[0].tokens
        rest = text[len(request.token_ids) :]
        differ = (i for i, token in enumerate(tokens) if i >= len(rest) or token != rest[i])
        return next(differ, len(tokens)), len(tokens)

    def _offsets(self, stride: int) -> range:
        """Where blocks begin, counted from the first output token, in descending order."""
        return range((max(self.counts) - 1) // stride * stride, -1, -stride)

    def _blocks(self, offset: int, depth: int) -> dict[int, tuple[int, int]]:
        """(offset, length) of the block of each sample that is long enough."""
        return {k: (offset, min(depth, n - offset)) for k, n in enumerate(self.counts) if n > offset}

    def _forward(self, model: CausalModel, blocks: Mapping[int, tuple[int, int]], found: Tally) -> None:
        """One pass over blocks (offset, length) by sample; adds to the tally which rows agree with the text."""
        if blocks:
            scores = self._scores(model, blocks)
            agrees = self._agrees(scores, blocks)
            found.add(blocks, agrees, sum(agrees) if self.params.greedy else self._overlap(scores, blocks))

    def _scores(self, model: CausalModel, blocks: Mapping[int, tuple[int, int]]) -> torch.Tensor:
        """Scores after the text so far. # [rows, V]; a padded head is cut or filled"""
        spans = []
        for k, (offset, length) in blocks.items():
            start = self.starts[k] + offset
            spans.append(Span(k, start, self.samples[k].token_ids[start : start + length], length))
        logits = model.forward(plan(spans, 1, min(KEY_MULTIPLE, model.row_invariance.key_multiple))).to(
            self.target.device
        )
        missing = self.target.vocab_size - logits.shape[1]
        logits = F.pad(logits, (0, missing), value=-torch.inf) if missing else logits
        return adjust(logits, (), (), 0, self.params)

    def _agrees(self, scores: torch.Tensor, blocks: Mapping[int, tuple[int, int]]) -> list[bool]:
        """Whether each row's token, drawn with the sample's own noise, is the text's next one."""
        texts: list[int] = []
        seeds: list[int] = []
        positions: list[int] = []
        for k, (offset, length) in blocks.items():
            first = self.starts[k] + offset + 1
            texts += self.samples[k].token_ids[first : first + length]
            seeds += [self.samples[k].seed] * length
            positions += range(first, first + length)
        chosen = sampling.choose(scores, self.params, seeds, positions)
        return [a == b for a, b in zip(chosen, texts, strict=True)]

    def _overlap(self, scores: torch.Tensor, blocks: Mapping[int, tuple[int, int]]) -> float:
        """Sum over rows of sum min(p, q), q from the draft's scores [rows, V]."""
        q = probabilities(restrict(scores, self.params))
        own = [slice(self.firsts[k] + offset, self.firsts[k] + offset + n) for k, (offset, n) in blocks.items()]
        ids, probs = (torch.cat([table[rows] for rows in own]) for table in (self.ids, self.probs))
        return float(torch.minimum(probs, q.gather(1, ids)).sum())

    def _distributions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and probabilities of the target's likeliest tokens at every position. # 2 x [positions, KEPT]"""
        kept = []
        with torch.inference_mode():
            for k, count in enumerate(self.counts):
                for offset in range(0, count, SHORT_SPAN):
                    scores = self._scores(self.target, {k: (offset, min(SHORT_SPAN, count - offset))})
                    p = probabilities(restrict(scores, self.params))
                    kept.append(p.topk(min(KEPT, p.shape[1])))
        return torch.cat([it.indices for it in kept]), torch.cat([it.values for it in kept])

    def _restore(self) -> None:
        for layer, kept in zip(self.target.cache.storage, self.pristine, strict=True):
            layer.copy_(kept)


def prefill(model: CausalModel, texts: Sequence[Sequence[int]]) -> None:
    """Write each text's keys and values into its slot."""
    model.cache.reserve(len(texts), max(map(len, texts)) + SHORT_SPAN)
    it = model.row_invariance
    with torch.inference_mode():
        for slot, text in enumerate(texts):
            for start in range(0, len(text), CHUNK):
                span = Span(slot, start, text[start : start + CHUNK], 0)
                model.forward(plan([span], it.min_rows, it.key_multiple, it.row_multiple))


def _leading(hits: Sequence[bool]) -> int:
    return next((i for i, hit in enumerate(hits) if not hit), len(hits))


def _never(token_id: int) -> bool:
    return False
