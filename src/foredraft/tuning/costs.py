"""What steps, drafts and sub-layers cost on this machine, measured in the engine itself.

One request after another is decoded while every few steps another drafter and another draft length take their turn, so
that a machine whose speed drifts is unfair to none, and everything a step does is in its price. A draft with skipped
sub-layers is priced by a fit: fixed + tokens * (base + attentions + MLPs), so that no candidate has to be timed.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from foredraft.drafters.base import Drafter, NoDrafter
from foredraft.llm import LLM
from foredraft.policy import DraftPolicy, StepTimes
from foredraft.tuning.calibration import Calibration
from foredraft.tuning.driving import driven_by
from foredraft.types import Draft, Request, Verdict

STRETCH = 4  # steps an arm runs in a row; the first, which warms caches up and catches up on tokens, is not counted
QUANTILE = 0.3  # of a cell's timings: robust against what else the machine does
PLAIN = ""


@dataclass(frozen=True, slots=True)
class DraftCost:
    """Seconds to draft: a fixed part, and each token's."""

    fixed: float
    token: float

    def seconds(self, tokens: int) -> float:
        return self.fixed + self.token * tokens if tokens else 0.0


@dataclass(frozen=True, slots=True)
class SublayerCosts:
    """Seconds of a self-draft: per draft, per token, and per token and sub-layer that is not skipped."""

    fixed: float
    token: float
    attention: float
    mlp: float

    def draft(self, attentions: int, mlps: int) -> DraftCost:
        return DraftCost(self.fixed, self.token + attentions * self.attention + mlps * self.mlp)


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a step but for drafting, by tokens drafted, linear in between; and of a prompt's pass."""

    lengths: tuple[int, ...]  # ascending, beginning with 0
    seconds: tuple[float, ...]
    prefill: float = 0.0

    def step(self, drafted: int) -> float:
        return float(np.interp(drafted, self.lengths, self.seconds))


@dataclass(frozen=True, slots=True)
class Costs:
    """All that was measured. `drafts` by drafter, `sublayers` by the weights a self-draft runs on."""

    steps: StepCosts
    drafts: Mapping[str, DraftCost] = field(default_factory=dict)
    sublayers: Mapping[str, SublayerCosts] = field(default_factory=dict)

    def ratio(self, draft: DraftCost) -> float:
        """A draft token's price in plain steps: the c of the formulas."""
        return draft.token / self.steps.step(0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Costs":
        steps = data["steps"]
        return cls(
            StepCosts(tuple(steps["lengths"]), tuple(steps["seconds"]), steps["prefill"]),
            {name: DraftCost(**cost) for name, cost in data["drafts"].items()},
            {name: SublayerCosts(**cost) for name, cost in data["sublayers"].items()},
        )


@dataclass(frozen=True, slots=True)
class Arm:
    """A drafter at a draft length; for the fit, the weights it runs on and how many sub-layers it keeps."""

    name: str
    drafter: Drafter
    gamma: int
    weights: str = ""
    attentions: int = 0
    mlps: int = 0


class Repeat(NoDrafter):
    """Drafts the last token again, at no cost: for the price of a pass of any width."""

    name = "repeat"

    def propose(self, sequences: list[Request], policy: DraftPolicy) -> list[Draft]:
        return [Draft((s.token_ids[-1],) * s.draft_limit, self.name) for s in sequences]


@dataclass(frozen=True, slots=True)
class Timed:
    arm: Arm
    times: StepTimes


class Carousel:
    """Drafter and policy at once: gives arms their turns, in another order each lap, and notes what steps took."""

    name = "carousel"

    def __init__(self, arms: Sequence[Arm], seed: int = 0) -> None:
        self.arms = arms
        self.order: list[Arm] = []
        self.source = random.Random(seed)
        self.laps = -1
        self.left = 0
        self.current: Arm | None = None
        self.timed: list[Timed] = []
        self.prefills: list[float] = []
        self.decoding = False  # has `start` been asked in this step?
        self.warm = False  # is this step counted?

    def start(self, sequence: Request) -> int:
        if self.left == 0:
            if not self.order:
                self.laps += 1
                self.order = self.source.sample(self.arms, len(self.arms))
            self.current, self.left = self.order.pop(), STRETCH
        self.left -= 1
        assert self.current is not None
        self.decoding, self.warm = True, self.left < STRETCH - 1
        return self.current.gamma

    def go_on(self, sequence: Request, confidences: tuple[float, ...]) -> bool:
        return True

    def propose(self, sequences: list[Request], policy: DraftPolicy) -> list[Draft]:
        assert self.current is not None
        return self.current.drafter.propose(sequences, policy)

    def observe_times(self, times: StepTimes) -> None:
        if not self.decoding:
            self.prefills.append(times.total)
        elif self.warm and self.current is not None:
            self.timed.append(Timed(self.current, times))
        self.decoding = False

    def observe(self, sequence: Request, *heard: Draft | Verdict) -> None:
        """As a drafter it hears a verdict, as a policy a draft and its verdict: the second is nobody's business."""
        if self.current is not None and isinstance(heard[0], Verdict):
            self.current.drafter.observe(sequence, heard[0])

    def forget(self, sequence: Request) -> None:
        """The next request begins a stretch of its own: its drafter has a prompt to catch up on."""
        self.left = 0
        for arm in self.arms:
            arm.drafter.forget(sequence)


def measure(
    llm: LLM,
    calibration: Calibration,
    arms: Sequence[Arm],
    *,
    laps: int,
    max_seconds: float,
    seed: int = 0,
) -> Costs:
    """Decode the calibration prompts with all arms in turn, `laps` times or until the time is up."""
    plain = [Arm(PLAIN, NoDrafter(), 0)] * max(1, len(arms) // 8)
    carousel = Carousel([*plain, *arms], seed)
    ends = perf_counter() + max_seconds
    with driven_by(llm, carousel, carousel):
        while carousel.laps < laps and perf_counter() < ends:
            for sample in calibration.samples:
                llm.generate(list(sample.prompt), calibration.params_of(sample))
                if carousel.laps >= laps or (carousel.laps > 0 and perf_counter() >= ends):
                    break
    return fit(carousel.timed, carousel.prefills)


def fit(timed: Iterable[Timed], prefills: Sequence[float]) -> Costs:
    """From timed steps to costs.

    A step's own price is that of steps whose drafts cost nothing. What a step takes beyond it is the draft's price, so
    that this has in it what drafting does to the processor's caches before the target's pass.
    """
    free: list[Timed] = []
    drafted: list[Timed] = []
    for it in timed:
        (free if it.arm.name in (PLAIN, Repeat.name) else drafted).append(it)
    steps = _steps(free, _low(prefills) if prefills else 0.0)
    beyond = [(it, it.times.total - steps.step(it.times.drafted)) for it in drafted if it.times.drafted]
    names = {it.arm.name for it, _ in beyond}
    families = {it.arm.weights for it, _ in beyond if it.arm.weights}
    return Costs(
        steps,
        {name: _line([pair for pair in beyond if pair[0].arm.name == name]) for name in sorted(names)},
        {name: _plane([pair for pair in beyond if pair[0].arm.weights == name]) for name in sorted(families)},
    )


def _low(values: Sequence[float]) -> float:
    return float(np.quantile(values, QUANTILE))


def _cells(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    """The low quantile of each key's values; of keys that were seen often enough to mean something, if there are."""
    found: dict[Any, list[float]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    enough = min(6, max(map(len, found.values())) / 4)
    return {key: _low(values) for key, values in sorted(found.items()) if len(values) >= enough}


def _steps(free: Iterable[Timed], prefill: float) -> StepCosts:
    """A wider pass never costs less: what says otherwise is noise."""
    cells = _cells((it.times.drafted, it.times.total - it.times.drafting) for it in free)
    seconds = np.maximum.accumulate(list(cells.values())).tolist()
    return StepCosts(tuple(cells), tuple(seconds), prefill)


def _line(beyond: Sequence[tuple[Timed, float]]) -> DraftCost:
    cells = _cells((it.times.drafted, seconds) for it, seconds in beyond)
    x = np.array(list(cells))
    fixed, token = _least_squares(np.stack([np.ones_like(x), x], 1), list(cells.values()))
    return DraftCost(fixed, token)


def _plane(beyond: Sequence[tuple[Timed, float]]) -> SublayerCosts:
    """fixed + d (token + attentions * a + mlps * m)"""
    cells = _cells(((it.times.drafted, it.arm.attentions, it.arm.mlps), seconds) for it, seconds in beyond)
    d, a, m = np.array(list(cells)).T
    fixed, token, attention, mlp = _least_squares(np.stack([np.ones_like(d), d, d * a, d * m], 1), list(cells.values()))
    return SublayerCosts(fixed, token, attention, mlp)


def _least_squares(columns: Any, values: Sequence[float]) -> list[float]:
    """Coefficients, none of them negative, of the least relative error; a column that would be is left out."""
    y = np.maximum(np.asarray(values, dtype=float), 1e-6)
    scaled = columns / y[:, None]
    active = list(range(columns.shape[1]))
    while active:
        found = np.linalg.lstsq(scaled[:, active], np.ones_like(y), rcond=None)[0]
        if (found >= 0).all():
            break
        active.pop(int(np.argmin(found * np.abs(scaled[:, active]).mean(0))))
    result = [0.0] * columns.shape[1]
    for place, value in zip(active, found if active else [], strict=True):
        result[place] = float(value)
    return result
