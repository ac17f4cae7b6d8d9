"""Speed-up by real generation: each prompt plain and with every candidate in turn, medians over rounds.

A candidate's tokens must equal plain decoding's; whether they did is part of the result. Where the rounds scatter there
are more of them, up to three times as many.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from foredraft.drafters.base import Drafter, NoDrafter
from foredraft.llm import LLM
from foredraft.stats import SpecStats
from foredraft.tuning.driving import driven_by
from foredraft.types import SamplingParams

ROUNDS = 3
MORE = 3  # times as many rounds at most
WIDE = 0.05  # a relative error of the speed-up beyond which there is another round
PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Candidate:
    drafter: Drafter
    gamma: int


@dataclass(frozen=True, slots=True)
class Confirmation:
    """Over all prompts, prefill included. `low` and `high` are the speed-ups of the slowest and fastest round."""

    speedup: float
    low: float
    high: float
    seconds: float
    equal: bool
    stats: SpecStats
    rounds: int = 1
    error: float = 0.0  # relative, of the speed-up: from the rounds' median absolute deviation


@dataclass(frozen=True, slots=True)
class Run:
    seconds: float
    token_ids: list[int]
    stats: SpecStats


def confirm(
    llm: LLM,
    candidates: Mapping[str, Candidate],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
    tick: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, Confirmation]:
    """Generate after every prompt with every candidate: a warm-up, `rounds` rounds, and more where they scatter."""
    arms = {PLAIN: Candidate(NoDrafter(), 0), **candidates}
    runs: dict[str, list[list[Run]]] = {name: [] for name in arms}  # [round][prompt]
    for arm in arms.values():
        _generate(llm, arm, prompts[0], replace(params, seed=seed), clock)
    for index in range(MORE * rounds):
        if index >= rounds and not any(_error(runs[PLAIN], runs[name]) > WIDE for name in candidates):
            break
        for found in runs.values():
            found.append([])
        for number, prompt in enumerate(prompts):
            order = list(arms) if (index + number) % 2 == 0 else list(reversed(arms))
            for name in order:
                own = replace(params, seed=seed + number)
                runs[name][index].append(_generate(llm, arms[name], prompt, own, clock))
            tick()
    return {name: _measured(runs[PLAIN], runs[name]) for name in candidates}


def _generate(
    llm: LLM, arm: Candidate, prompt: Sequence[int], params: SamplingParams, clock: Callable[[], float]
) -> Run:
    with driven_by(llm, arm.drafter):
        began = clock()
        result = llm.generate(list(prompt), params, num_draft_tokens=arm.gamma)
        return Run(clock() - began, result.token_ids, result.stats)


def _error(plain: Sequence[Sequence[Run]], found: Sequence[Sequence[Run]]) -> float:
    """Relative standard error of the speed-up, as far as the rounds tell; 0 of a single one."""
    ratios = _ratios(plain, found)
    middle = statistics.median(ratios)
    deviation = statistics.median(abs(ratio - middle) for ratio in ratios)
    return float(1.4826 * deviation / middle / len(ratios) ** 0.5)


def _ratios(plain: Sequence[Sequence[Run]], found: Sequence[Sequence[Run]]) -> list[float]:
    return [_total(a) / _total(b) for a, b in zip(plain, found, strict=True)]


def _measured(plain: list[list[Run]], found: list[list[Run]]) -> Confirmation:
    ratios = _ratios(plain, found)
    stats = SpecStats()
    for run in found[0]:
        stats.add(run.stats)
    equal = all(
        a.token_ids == b.token_ids for x, y in zip(plain, found, strict=True) for a, b in zip(x, y, strict=True)
    )
    seconds = _median_total(found)
    speedup, error = _median_total(plain) / seconds, _error(plain, found)
    return Confirmation(speedup, min(ratios), max(ratios), seconds, equal, stats, len(found), error)


def _total(runs: Sequence[Run]) -> float:
    return sum(run.seconds for run in runs)


def _median_total(rounds: Sequence[Sequence[Run]]) -> float:
    """Each prompt's median over the rounds, summed."""
    return float(sum(statistics.median(run.seconds for run in prompt) for prompt in zip(*rounds, strict=True)))
