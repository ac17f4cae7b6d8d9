"""Timing steps in the engine itself: every few steps another drafter and another draft length take their turn.

A machine whose speed drifts is then unfair to none, and everything a step does is in its price. Turns whose timings
scatter too much to tell prices apart get more of them, a few times at most.
"""

import random
from collections.abc import Callable, Sequence
from time import perf_counter

from foredraft.drafters.base import NoDrafter
from foredraft.drafters.several import Several
from foredraft.llm import LLM
from foredraft.models.rows import PREFILL_CHUNK
from foredraft.policy import Choice, DraftPolicy, PerRequest, StepTimes, StopRule
from foredraft.stats import SpecStats
from foredraft.tuning.calibration import CalibrationText
from foredraft.tuning.costs import Costs, Timed, Timings, Turn
from foredraft.tuning.driving import driven_by
from foredraft.tuning.fitting import PLAIN, REPEAT, fit, too_wide
from foredraft.tuning.machine import LoadMeter
from foredraft.types import Draft, Request, Verdict

STRETCH = 4  # steps of a turn; the first, which warms caches up and catches up on tokens, is not counted
REPEATS = 3  # times that turns with too wide a spread are measured again, at most


class Repeat(NoDrafter):
    """Drafts the last token again, at no cost: for the price of a pass of any width."""

    name = REPEAT

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        return [Draft((request.token_ids[-1],) * request.draft_limit, self.name) for request in requests]


class Carousel:
    """Drafter and policy at once: gives turns in another order each lap, and notes what their steps took."""

    name = "carousel"

    def __init__(self, turns: Sequence[Turn], seed: int = 0, stretch: int = STRETCH) -> None:
        self.turns = turns
        self.stretch = stretch
        self.order: list[Turn] = []
        self.source = random.Random(seed)
        self.laps = -1  # that have begun, less one
        self.left = 0
        self.current: Turn | None = None
        self.found = Timings()
        self.choice = Choice()  # what several drafters of one turn are chosen by
        self.readers: set[str] = set()  # drafters that have read this text
        self.behind = 0  # tokens that this step's drafter reads first
        self.decoding = False  # has `start` been asked in this step?
        self.warm = False  # is this step counted?

    def begin(self, turns: Sequence[Turn]) -> None:
        """Other turns from here on, with laps counted anew."""
        self.turns, self.order, self.laps, self.left = turns, [], -1, 0

    def start(self, request: Request) -> int:
        if self.left == 0:
            if not self.order:
                self.laps += 1
                self.order = self.source.sample(self.turns, len(self.turns))
            self.current, self.left = self.order.pop(), self.stretch
        self.left -= 1
        assert self.current is not None
        self.decoding, self.warm = True, self.left < self.stretch - 1
        return self.current.gamma

    def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
        return True

    def rule(self, requests: list[Request], most: int) -> StopRule:
        return StopRule([None] * len(requests))

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        assert self.current is not None
        self.behind = 0 if self.current.name in self.readers else max(len(it.token_ids) for it in requests)
        self.readers.add(self.current.name)
        if isinstance(self.current.drafter, Several):
            return self._chosen(self.current.drafter, requests)
        return self.current.drafter.propose(requests, policy)

    def _chosen(self, drafter: Several, requests: list[Request]) -> list[Draft]:
        """As many as the turn says, by whoever is best: asking and choosing are a part of the price."""
        for request in requests:
            request.num_draft_tokens = request.draft_limit
        try:
            return drafter.propose(requests, PerRequest(self.choice))
        finally:
            for request in requests:
                request.num_draft_tokens = None

    def observe_times(self, times: StepTimes) -> None:
        if not self.decoding:
            self.found.prefills.append((times.read + 1, times.total))
        elif self.current is not None and self.behind:
            self.found.starts.append(Timed(self.current, times, self.behind))
        elif self.current is not None and self.warm:
            self.found.steps.append(Timed(self.current, times))
        self.decoding, self.behind = False, 0
        self.choice.observe_times(times)

    def observe(self, request: Request, *heard: Draft | Verdict) -> None:
        """Called twice a step: with a verdict as a drafter, with a draft and its verdict as a policy."""
        if isinstance(heard[0], Draft):
            self.choice.observe(request, *heard)  # type: ignore[arg-type]
        elif self.current is not None:
            self.current.drafter.observe(request, heard[0])

    def forget(self, request: Request) -> None:
        """The next request begins with a new turn: its drafter has a prompt to catch up on."""
        self.left = 0
        self.readers.clear()
        self.choice.forget(request)
        for turn in self.turns:
            turn.drafter.forget(request)


def measure(
    llm: LLM,
    text: CalibrationText,
    turns: Sequence[Turn],
    *,
    laps: int,
    max_seconds: float,
    seed: int = 0,
    stretch: int = STRETCH,
    clock: Callable[[], float] = perf_counter,
    meter: LoadMeter | None = None,
) -> Costs:
    """Decode the calibration prompts with all turns, `laps` times or until the time is up; what scatters, again."""
    meter = meter or LoadMeter()
    carousel, plain = Carousel([], seed, stretch), Turn(PLAIN, NoDrafter(), 0)
    ends = clock() + max_seconds

    def ride(turns: Sequence[Turn]) -> Sequence[Timed]:
        carousel.begin([*[plain] * max(1, len(turns) // 8), *turns])
        while carousel.laps < laps and clock() < ends:
            for sample in text.samples:
                meter.sample()
                stats = llm.generate(list(sample.prompt), text.params_of(sample)).stats
                carousel.found.around.append(_around(stats, len(sample.prompt)))
                if carousel.laps >= laps or (carousel.laps > 0 and clock() >= ends):
                    break
        return carousel.found.steps

    with driven_by(llm, carousel, carousel):
        settle(ride, turns, lambda: clock() < ends)
    return fit(carousel.found, [sample.prompt_len for sample in text.samples], meter.load)


def _around(stats: SpecStats, prompt: int) -> float:
    """Seconds a step that no step's clock has seen."""
    inside = stats.seconds_drafting + stats.seconds_verifying + stats.seconds_other
    steps = stats.target_passes + (prompt - 1) // PREFILL_CHUNK
    return max(0.0, stats.seconds_total - inside) / steps


def settle(
    ride: Callable[[Sequence[Turn]], Sequence[Timed]], turns: Sequence[Turn], has_time: Callable[[], bool]
) -> None:
    """Time all turns, then those that scatter, until none does, `REPEATS` times at most and while there is time.

    `ride` times the turns it is given beside plain steps, and returns everything that was timed so far.
    """
    timed = ride(turns)
    for _ in range(REPEATS):
        wide = too_wide(timed)
        if not wide or not has_time():
            break
        timed = ride([turn for turn in wide if turn.name != PLAIN])
