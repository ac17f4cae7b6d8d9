"""Planted bugs of verification: which tokens are kept, and from what scores. Greedy and coupled texts show them."""

from dataclasses import replace

import torch

from foredraft import sampling, verify
from foredraft.engine import Engine
from foredraft.scores import adjust
from foredraft.types import Draft, Request, SamplingParams, Verdict


class KeepsAll(Engine):
    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        return replace(super()._verify(draft, logits, request), accepted=tuple(range(len(draft))))


class KeepsOneTooMany(Engine):
    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        verdict = super()._verify(draft, logits, request)
        return replace(verdict, accepted=tuple(range(min(len(verdict.accepted) + 1, len(draft)))))


class KeysNoiseByRow(Engine):
    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        scores = adjusted(draft, logits, request, request.params)
        return verify.match(draft, sampling.choose(scores, request.params, request.seed, range(len(scores))))


class DrawsBonusFromRawLogits(Engine):
    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        scores = torch.cat((adjusted(draft, logits, request, request.params)[:-1], logits[-1:].float()))
        return chosen(draft, scores, request)


class IgnoresTemperature(Engine):
    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        if request.params.greedy:
            return super()._verify(draft, logits, request)
        return chosen(draft, adjusted(draft, logits, request, replace(request.params, temperature=1.0)), request)


class ScalesTwice(Engine):
    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        return super()._verify(draft, logits / (request.params.temperature or 1.0), request)


class WritesIntoTheLogits(Engine):
    """The temperature is applied in place, behind the choice: only log-probabilities look at the logits again."""

    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        verdict = super()._verify(draft, logits, request)
        if draft.tokens and not request.params.greedy:
            logits.div_(request.params.temperature)
        return verdict


class PenalisesWithOnePrefix(Engine):
    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        p, ids = request.params, request.token_ids
        scores = adjust(logits, ids, [()] * len(logits), request.prompt_len, p, request.steering)
        return chosen(draft, scores, request)


class PenalisesWithTheJudgedToken(Engine):
    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        rows = verify.paths(draft)
        shifted = [*rows[1:], rows[-1]]
        p, ids = request.params, request.token_ids
        scores = adjust(logits, ids, shifted, request.prompt_len, p, request.steering)
        return chosen(draft, scores, request)


class DropsBiases(Engine):
    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        return chosen(draft, adjusted(draft, logits, request, replace(request.params, logit_bias={})), request)


class IgnoresMinP(Engine):
    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        scores = adjusted(draft, logits, request, request.params)
        return chosen(draft, scores, request, replace(request.params, min_p=0.0))


class DropsProcessors(Engine):
    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        return chosen(draft, adjusted(draft, logits, request, replace(request.params, processors=())), request)


class DecidesGreedyByRatio(Engine):
    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        if not request.params.greedy:
            return super()._verify(draft, logits, request)
        start = len(request.token_ids)
        chances = adjusted(draft, logits, request, request.params).softmax(-1)
        return verify.rejection(draft, chances, request.seed, range(start, start + len(logits)))


def adjusted(draft: Draft, logits: torch.Tensor, request: Request, params: SamplingParams) -> torch.Tensor:
    rows = verify.paths(draft)
    steering = request.steering if params.processors == request.params.processors else None
    return adjust(logits, request.token_ids, rows, request.prompt_len, params, steering)


def chosen(draft: Draft, scores: torch.Tensor, request: Request, params: SamplingParams | None = None) -> Verdict:
    start = len(request.token_ids)
    positions = range(start, start + len(scores))
    return verify.match(draft, sampling.choose(scores, params or request.params, request.seed, positions))
