"""Speed-up by real generation: each prompt plain and with every candidate in turn, medians over rounds.

A candidate's tokens must equal plain decoding's; whether they did is part of the result.
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
PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Candidate:
    drafter: Drafter
    gamma: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Over all prompts, prefill included. `low` and `high` are the speed-ups of the slowest and fastest round."""

    speedup: float
    low: float
    high: float
    seconds: float
    equal: bool
    stats: SpecStats


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
) -> dict[str, Measured]:
    """Generate after every prompt with every candidate, `rounds` times each after a warm-up."""
    arms = {PLAIN: Candidate(NoDrafter(), 0), **candidates}
    runs: dict[str, list[list[Run]]] = {name: [] for name in arms}  # [round][prompt]
    for arm in arms.values():
        _generate(llm, arm, prompts[0], replace(params, seed=seed))
    for index in range(rounds):
        for found in runs.values():
            found.append([])
        for number, prompt in enumerate(prompts):
            order = list(arms) if (index + number) % 2 == 0 else list(reversed(arms))
            for name in order:
                runs[name][index].append(_generate(llm, arms[name], prompt, replace(params, seed=seed + number)))
            tick()
    return {name: _measured(runs[PLAIN], runs[name]) for name in candidates}


def _generate(llm: LLM, arm: Candidate, prompt: Sequence[int], params: SamplingParams) -> Run:
    with driven_by(llm, arm.drafter):
        began = perf_counter()
        result = llm.generate(list(prompt), params, num_draft_tokens=arm.gamma)
        return Run(perf_counter() - began, result.token_ids, result.stats)


def _measured(plain: list[list[Run]], found: list[list[Run]]) -> Measured:
    ratios = [_total(a) / _total(b) for a, b in zip(plain, found, strict=True)]
    stats = SpecStats()
    for run in found[0]:
        stats.add(run.stats)
    equal = all(
        a.token_ids == b.token_ids for x, y in zip(plain, found, strict=True) for a, b in zip(x, y, strict=True)
    )
    seconds = _median_total(found)
    return Measured(_median_total(plain) / seconds, min(ratios), max(ratios), seconds, equal, stats)


def _total(runs: Sequence[Run]) -> float:
    return sum(run.seconds for run in runs)


def _median_total(rounds: Sequence[Sequence[Run]]) -> float:
    """Each prompt's median over the rounds, summed."""
    return float(sum(statistics.median(run.seconds for run in prompt) for prompt in zip(*rounds, strict=True)))
