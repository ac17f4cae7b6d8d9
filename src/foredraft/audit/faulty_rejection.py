"""Planted bugs of rejection sampling: the text looks as good as ever, and its distribution is another."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from foredraft import noise, sampling, verify
from foredraft.audit.faulty_verification import adjusted
from foredraft.engine import Engine
from foredraft.noise import Stream
from foredraft.scores import probabilities, restrict
from foredraft.types import Draft, Request, Verdict

Accept = Callable[[float, float], float]
Rest = Callable[[torch.Tensor, int, "torch.Tensor | None"], torch.Tensor]


class FaultyRejection(Engine):
    """Leviathan et al.'s algorithm with its two formulas to be replaced."""

    accept: Accept = staticmethod(verify.acceptance)
    rest: Rest = staticmethod(verify.residual)

    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        if request.params.greedy or request.params.verifier != "rejection" or draft.probs is None:
            return super()._verify(draft, logits, request)
        scores = adjusted(draft, logits, request, request.params)
        p = probabilities(restrict(scores, request.params))
        start = len(request.token_ids)
        key = noise.fold(request.seed, start)
        places = range(start, start + len(p))
        uniforms = self.dice(key, places[:-1])
        for i, (token, q, uniform) in enumerate(zip(draft.tokens, draft.probs, uniforms, strict=True)):
            if uniform >= self.accept(float(p[i, token]), float(q[token])):
                weights = self.rest(p[i], token, q)
                drawn = sampling.race(weights[None], key, places[i : i + 1], Stream.RESIDUAL)
                return self.refused(Verdict(tuple(range(i)), int(drawn), "recovered"), draft)
        drawn = sampling.race(p[-1:], key, places[-1:], Stream.BONUS)
        return Verdict(tuple(range(len(draft))), int(drawn), "bonus")

    def dice(self, key: int, places: Sequence[int]) -> list[float]:
        return [float(value) for value in noise.uniform(key, places, 1, Stream.ACCEPT).flatten()]

    def refused(self, verdict: Verdict, draft: Draft) -> Verdict:
        return verdict


class InvertsTheRatio(FaultyRejection):
    accept = staticmethod(lambda p, q: min(1.0, q / max(p, 1e-30)))


class AcceptsEverything(FaultyRejection):
    accept = staticmethod(lambda p, q: 1.0)


class TakesTheLikeliestOfTheRest(FaultyRejection):
    rest = staticmethod(
        lambda p, token, q: torch.zeros_like(p).index_fill_(0, verify.residual(p, token, q).argmax(), 1.0)
    )


class TakesProbabilitiesForLogits(FaultyRejection):
    rest = staticmethod(lambda p, token, q: verify.residual(p, token, q).softmax(-1))


class DrawsAgainFromTheTarget(FaultyRejection):
    rest = staticmethod(lambda p, token, q: p)


class ThrowsOneDie(FaultyRejection):
    def dice(self, key: int, places: Sequence[int]) -> list[float]:
        return super().dice(key, places[:1]) * len(places)


class RefusesOneLate(FaultyRejection):
    def refused(self, verdict: Verdict, draft: Draft) -> Verdict:
        return replace(verdict, accepted=tuple(range(min(len(verdict.accepted) + 1, len(draft)))))
