"""Speed-up from acceptance and costs, over draft lengths; arithmetic only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foredraft.tuning.acceptance import Acceptance, walk
from foredraft.tuning.costs import DraftCost, StepCosts

MAX_GAMMA = 16


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a drafter should give at its best draft length. `by_length[g]` is the speed-up with g tokens; [0] is 1."""

    gamma: int
    speedup: float
    by_length: tuple[float, ...]
    tokens_per_pass: float
    draft_acceptance_rate: float


def forecast(acceptance: Acceptance, draft: DraftCost, steps: StepCosts, max_new_tokens: int | None = None) -> Forecast:
    """Count the steps that each draft length would take on the calibration text, and price them."""
    lengths = range(1, min(MAX_GAMMA, acceptance.depth) + 1)
    rounds = [walk(acceptance, gamma, max_new_tokens) for gamma in lengths]
    samples = len(acceptance.runs)
    plain = samples * steps.prefill + acceptance.positions * steps.whole(0)
    once = samples * (steps.prefill + draft.start)
    seconds = [once + sum(n * (steps.whole(d) + draft.seconds(d)) for d, n in it.steps.items()) for it in rounds]
    by_length = (1.0, *(plain / s if s else 1.0 for s in seconds))
    gamma = max(lengths, key=lambda g: by_length[g])
    best = rounds[gamma - 1]
    return Forecast(gamma, by_length[gamma], by_length, best.tokens_per_pass, best.draft_acceptance_rate)


def expected_tokens(conditional: Sequence[float]) -> float:
    """Tokens a pass yields when draft token i is accepted with probability conditional[i], given all before it.

    With all of them alpha: (1 - alpha^(gamma + 1)) / (1 - alpha) (Leviathan et al. 2023, eq. 1).
    """
    tokens, survival = 1.0, 1.0
    for chance in conditional:
        survival *= chance
        tokens += survival
    return tokens


def speedup_formula(alpha: float, gamma: int, cost: float, verify: Callable[[int], float] = lambda gamma: 1.0) -> float:
    """(1 - alpha^(gamma + 1)) / ((1 - alpha) (cost gamma + verify(gamma))) (Leviathan et al. 2023, theorem 3.8).

    `cost` is a draft token's, `verify(gamma)` that of the pass that checks gamma of them, both over a plain step's; in
    the original a wider pass costs nothing more.
    """
    return expected_tokens([alpha] * gamma) / (cost * gamma + verify(gamma))
