"""From runs to figures: speed-ups with intervals, acceptance, times. Arithmetic only.

A speed-up is plain decoding's seconds over an arm's, all requests together, each request's median over the rounds,
prompts included. Its interval comes from drawing the tasks anew, with replacement. Fewer than `FEWEST` have none: the
widest that drawing can give is from the least to the most of them, which holds a median in less than 95 of 100 cases.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from foredraft.bench.asking import Run
from foredraft.bench.measure import PLAIN, Request
from foredraft.stats import SpecStats

DRAWS = 2000
LEVEL = 0.95
FEWEST = 6  # prompts for an interval: what n of them gave, from least to most, holds a median with 1 - 2^(1 - n)


@dataclass(frozen=True, slots=True)
class Speedup:
    """`low` and `high` bound it at `LEVEL`, as far as these tasks stand for others; None: too few tasks to say."""

    value: float
    low: float | None
    high: float | None

    @property
    def bounds(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True, slots=True)
class CategoryFigures:
    requests: int
    speedup: float
    mean_acceptance_length: float


@dataclass(frozen=True, slots=True)
class TimeSplit:
    """Seconds over all requests of a round. `outside`: between arrival and end, but in no step of this request."""

    drafting: float
    verifying: float
    other: float
    outside: float

    @property
    def total(self) -> float:
        return self.drafting + self.verifying + self.other + self.outside


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """What one arm gave. `speedup.value` is 1 for plain decoding."""

    name: str
    num_draft_tokens: int | None
    speedup: Speedup
    pass_speedup: float  # plain passes of the target over this arm's
    median_tokens_per_second: float  # of all requests, from their median seconds; `stats` has the first round's
    seconds_to_first_token: float  # median over requests
    seconds_per_token: float  # after the first one; median over requests
    times: TimeSplit
    stats: SpecStats  # of the first round
    categories: Mapping[str, CategoryFigures]  # "": prompts of none


def arm_figures(requests: Sequence[Request], name: str, num_draft_tokens: int | None) -> ArmFigures:
    plain, own = ([_median(it, arm, _seconds) for it in requests] for arm in (PLAIN, name))
    stats = total(requests, name)
    per_token = [_median(it, name, _per_token) for it in requests if len(it.reference.token_ids) > 1]
    return ArmFigures(
        name,
        num_draft_tokens,
        speedup([it.place.index for it in requests], plain, own),
        total(requests, PLAIN).target_passes / stats.target_passes,
        stats.output_tokens / sum(own),
        statistics.median(_median(it, name, lambda run: run.stats.seconds_to_first_token) for it in requests),
        statistics.median(per_token) if per_token else 0.0,
        _split(requests, name),
        stats,
        _categories(requests, name),
    )


def speedup(tasks: Sequence[int], plain: Sequence[float], own: Sequence[float]) -> Speedup:
    """Of total seconds; `tasks[i]` is the task of request i, and tasks are what is drawn anew."""
    places = {task: place for place, task in enumerate(dict.fromkeys(tasks))}
    sums = np.zeros((2, len(places)))
    for task, a, b in zip(tasks, plain, own, strict=True):
        sums[:, places[task]] += a, b
    value = float(sums[0].sum() / sums[1].sum())
    if len(places) < FEWEST:
        return Speedup(value, None, None)
    drawn = np.random.default_rng(0).integers(0, len(places), (DRAWS, len(places)))
    a, b = sums[:, drawn].sum(2)
    low, high = np.quantile(a / b, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Speedup(value, float(low), float(high))


def total(requests: Sequence[Request], name: str) -> SpecStats:
    """Counters and seconds of the first round."""
    stats = SpecStats()
    for request in requests:
        stats.add(request.rounds[0][name].stats)
    return stats


def _categories(requests: Sequence[Request], name: str) -> dict[str, CategoryFigures]:
    found: dict[str, list[Request]] = {}
    for request in requests:
        found.setdefault(request.place.task.category, []).append(request)
    return {category: _category(own, name) for category, own in found.items()}


def _category(requests: Sequence[Request], name: str) -> CategoryFigures:
    plain, own = (sum(_median(it, arm, _seconds) for it in requests) for arm in (PLAIN, name))
    return CategoryFigures(len(requests), plain / own, total(requests, name).mean_acceptance_length)


def _split(requests: Sequence[Request], name: str) -> TimeSplit:
    def over(read: Callable[[Run], float]) -> float:
        return sum(_median(it, name, read) for it in requests)

    drafting = over(lambda run: run.stats.seconds_drafting)
    verifying = over(lambda run: run.stats.seconds_verifying)
    other = over(lambda run: run.stats.seconds_other)
    return TimeSplit(drafting, verifying, other, max(0.0, over(_seconds) - drafting - verifying - other))


def _median(request: Request, name: str, read: Callable[[Run], float]) -> float:
    return statistics.median(read(runs[name]) for runs in request.rounds)


def _seconds(run: Run) -> float:
    return run.seconds


def _per_token(run: Run) -> float:
    return (run.seconds - run.stats.seconds_to_first_token) / max(1, len(run.token_ids) - 1)


def tokens_over_time(requests: Sequence[Request], names: Sequence[str]) -> dict[str, tuple[tuple[float, int], ...]]:
    """When the tokens of one request came, in each arm: of the longest text, in the round of its median time."""
    request = max(requests, key=lambda it: len(it.reference.token_ids))
    runs = {name: sorted((it[name] for it in request.rounds), key=_seconds) for name in names}
    return {name: own[len(own) // 2].arrivals for name, own in runs.items()}
