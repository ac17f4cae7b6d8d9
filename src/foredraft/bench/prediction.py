"""What `foredraft tune` would have said: acceptance by teacher forcing, costs of steps, and the speed-up they make.

Scored on the texts that plain decoding gave, so nothing of it comes from a run of the drafter that was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from foredraft.bench.measure import Request
from foredraft.bench.options import BenchOptions
from foredraft.drafters.several import drafters_of, without_memory
from foredraft.llm import LLM
from foredraft.tuning.acceptance import Acceptance
from foredraft.tuning.calibration import CalibrationText, Sample
from foredraft.tuning.candidates import wide_passes
from foredraft.tuning.carousel import measure
from foredraft.tuning.costs import Costs, DraftCost, Turn
from foredraft.tuning.forecast import forecast
from foredraft.tuning.pipeline import acceptance_of
from foredraft.tuning.score import Scorer

TEXTS = 32
GAMMAS = (1, 2, 4, 6)  # draft lengths that are timed: two give a line whose slope is mostly noise
COST_LAPS, COST_SECONDS = 16, 20.0
STRETCH = 12  # steps of a turn: a plain step soon after a draft takes longer than in a text decoded plain


@dataclass(frozen=True, slots=True)
class Prediction:
    """`alpha` is E[sum min(p, q)], at temperature 0 the share of equal argmaxes; `speedups[g]` with g drafted."""

    alpha: float
    cost_ratio: float  # a draft token's price in plain steps, beyond that of a draft
    draft_ratio: float  # a draft's, however long it is
    speedups: tuple[float, ...]

    def at(self, num_draft_tokens: int | None) -> float | None:
        """None for lengths that were not looked at, and where a policy decides."""
        if num_draft_tokens is None or num_draft_tokens >= len(self.speedups):
            return None
        return self.speedups[num_draft_tokens]


def predict(llm: LLM, requests: Sequence[Request], options: BenchOptions) -> Prediction | None:
    """Of several drafters, by the best one at each length. None where no text is longer than a token. The LLM must be
    idle."""
    text = _text(requests, options)
    if text is None:
        return None
    drafter, most = llm.drafter, llm.model.row_invariance.max_draft_tokens
    turns = [Turn(drafter.name, drafter, min(gamma, most)) for gamma in GAMMAS] + wide_passes(most)
    with without_memory(drafter):
        scorer = Scorer(llm.model, text)
        try:
            acceptances = [acceptance_of(scorer, it) for it in drafters_of(drafter)]
        finally:
            scorer.close()
        costs = measure(llm, text, turns, laps=COST_LAPS, max_seconds=COST_SECONDS, stretch=STRETCH)
    price = costs.drafts.get(drafter.name, DraftCost(0.0, 0.0))
    return _best([_predicted(costs, price, it, options) for it in acceptances])


def _predicted(costs: Costs, price: DraftCost, acceptance: Acceptance, options: BenchOptions) -> Prediction:
    found = forecast(acceptance, price, costs.steps, options.params.max_new_tokens)
    return Prediction(acceptance.alpha, costs.ratio(price), price.fixed / costs.steps.step(0), found.by_length)


def _best(found: Sequence[Prediction]) -> Prediction:
    """By its drafts: without any all are as fast as plain decoding."""
    best = max(found, key=lambda it: max(it.speedups[1:], default=0.0))
    most = max(len(it.speedups) for it in found)
    tops = tuple(max(it.speedups[g] for it in found if g < len(it.speedups)) for g in range(most))
    return replace(best, speedups=tops)


def _text(requests: Sequence[Request], options: BenchOptions) -> CalibrationText | None:
    """What plain decoding made of some requests, spread over all of them."""
    long = [it for it in requests if len(it.reference.token_ids) > 1]
    chosen = [long[i * len(long) // TEXTS] for i in range(TEXTS)] if len(long) > TEXTS else long
    samples = [
        Sample((*it.prompt.token_ids, *it.reference.token_ids), len(it.prompt.token_ids), it.place.seed)
        for it in chosen
    ]
    samples.sort(key=lambda it: -it.num_output)
    return CalibrationText(tuple(samples), options.params) if samples else None
