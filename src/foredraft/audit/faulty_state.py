"""Planted bugs of what is kept between steps: the cache, rows and positions, ends, counts, processors and the
grammar."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from foredraft.engine import Engine
from foredraft.models.base import CausalModel
from foredraft.models.rows import RowBatch, Span
from foredraft.steering import Steering
from foredraft.structured import Constraint
from foredraft.structured.mask import only
from foredraft.types import Draft, FinishReason, Request, StepOutput, TokenLogprobs


class Drifting(Engine):
    """Knows how many tokens of each request were refused."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drift: dict[Request, int] = {}

    def _commit(self, request: Request, draft: Draft, logits: torch.Tensor) -> StepOutput:
        output = super()._commit(request, draft, logits)
        self.drift[request] = self.drift.get(request, 0) + len(draft) - sum(output.from_draft)
        return output


class KeepsTheCacheOfRejectedTokens(Drifting):
    """The cache is not cut back: what follows is written behind the tokens that were refused."""

    def _span(self, request: Request, draft: Draft) -> Span:
        span = super()._span(request, draft)
        most = self.max_model_len - len(span.tokens) - span.start
        return span._replace(start=span.start + max(0, min(self.drift.get(request, 0), most)))


class IsOneOffAfterARejection(Drifting):
    def _span(self, request: Request, draft: Draft) -> Span:
        span = super()._span(request, draft)
        return span._replace(start=span.start - 1) if self.drift.get(request) else span


class Wrapped:
    """A target with a bug."""

    def __init__(self, model: CausalModel) -> None:
        self._model = model
        self._running: Any = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def watch(self, engine: Engine) -> None:
        self._running = engine.scheduler.running


class LeavesStaleKeys(Wrapped):
    """A position that was written once is not written again: a refused token's keys and values stay."""

    def __init__(self, model: CausalModel) -> None:
        super().__init__(model)
        self.written: dict[tuple[Request, int], int] = {}

    def forward(self, rows: RowBatch) -> torch.Tensor:
        owner = {request.slot: request for request in self._running}
        places = [(owner[slot], position) for slot, position in zip(rows.slots, rows.positions, strict=True)]
        tokens = [self.written.setdefault(place, token) for place, token in zip(places, rows.tokens, strict=True)]
        return self._model.forward(rows._replace(tokens=tokens))


class DependsOnItsNeighbours(Wrapped):
    """A last bit that tells how many rows a pass has, as kernels chosen by size leave it."""

    def forward(self, rows: RowBatch) -> torch.Tensor:
        logits = self._model.forward(rows)
        return logits * (1 + 2**-20) if len(rows.wanted) > 1 else logits


class SwapsRows(Wrapped):
    """Two requests get each other's logits."""

    def forward(self, rows: RowBatch) -> torch.Tensor:
        logits = self._model.forward(rows)
        return logits.roll(1, 0) if len({rows.slots[row] for row in rows.wanted}) > 1 else logits


class EndsLate(Engine):
    """The end of a text is seen when the pass is over, and not within a draft."""

    def _commit(self, request: Request, draft: Draft, logits: torch.Tensor) -> StepOutput:
        self.seen: FinishReason | None = None
        output = super()._commit(request, draft, logits)
        return output if self.seen is None else replace(output, finish_reason=self.seen)

    def _ends(self, request: Request, token: int) -> FinishReason | None:
        self.seen = super()._ends(request, token) or self.seen
        return None


class IsOneOffFarBehind(Engine):
    def _span(self, request: Request, draft: Draft) -> Span:
        span = super()._span(request, draft)
        return span._replace(start=span.start - 1) if len(draft) and span.start > 512 else span


class TellsRefusedTokens(Engine):
    """The stream of text hears of the first token that was refused, too."""

    def _commit(self, request: Request, draft: Draft, logits: torch.Tensor) -> StepOutput:
        output = super()._commit(request, draft, logits)
        kept = sum(output.from_draft)
        if kept < len(draft) and not output.finish_reason and not request.params.stop:
            request.stop_rule(draft.tokens[kept])
        return output


class HandsOverOneTooFew(Engine):
    """The last token of a long step is committed, and not among those that the step hands over."""

    def _commit(self, request: Request, draft: Draft, logits: torch.Tensor) -> StepOutput:
        output = super()._commit(request, draft, logits)
        few = output.token_ids[:-1] if len(output.token_ids) > 2 else output.token_ids
        return replace(output, token_ids=few)


class CountsTwice(Engine):
    def _commit(self, request: Request, draft: Draft, logits: torch.Tensor) -> StepOutput:
        output = super()._commit(request, draft, logits)
        request.stats.accepted += sum(output.from_draft)
        return output


class ForgetsLogprobs(Engine):
    def _commit(self, request: Request, draft: Draft, logits: torch.Tensor) -> StepOutput:
        output = super()._commit(request, draft, logits)
        for i, drafted in enumerate(request.from_draft if request.logprobs else ()):
            if drafted:
                request.logprobs[i] = TokenLogprobs(request.logprobs[i].token, 0.0)
        return output


class Remembering(Steering):
    """Its processors go on from the whole draft, whatever of it was kept."""

    def commit(self, tokens: Sequence[int], *, ended: bool) -> None:
        last = self.ahead[-1]
        super().commit(tokens, ended=ended)
        self.ahead = [last]


class RemembersRefusedTokens(Engine):
    def add(self, request: Request) -> None:
        if any(request.steering.stateful):
            request.steering = Remembering(request.params.processors, request.steering.constraint)
        super().add(request)


class Forgetful:
    """A grammar that masks each row as if no draft token came before it."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._constraint, name)

    def allowed_after(self, paths: Any) -> Any:
        return self._constraint.allowed_after([()] * len(paths))


class ForgetsTheGrammar(Engine):
    def add(self, request: Request) -> None:
        if request.steering.constraint is not None:
            request.steering.constraint = Forgetful(request.steering.constraint)
        super().add(request)


class Lagging(Steering):
    """What it masks each row with is the mask of the row before."""

    def apply(self, scores: torch.Tensor, prefix: Sequence[int], paths: Sequence[Sequence[int]]) -> torch.Tensor:
        constraint, self.constraint = self.constraint, None
        try:
            scores = super().apply(scores, prefix, paths)
        finally:
            self.constraint = constraint
        return only(scores, constraint.allowed_after([paths[0], *paths[:-1]])) if constraint is not None else scores


class MasksARowLate(Engine):
    def add(self, request: Request) -> None:
        if request.steering.constraint is not None:
            request.steering = Lagging(request.params.processors, request.steering.constraint)
        super().add(request)
