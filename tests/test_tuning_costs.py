"""Tuning's arithmetic: walking a text, costs and how sure they are, formulas, and whether the machine is busy."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from foredraft.drafters.base import Drafter
from foredraft.policy import StepTimes
from foredraft.tuning.acceptance import Acceptance, run_lengths, walk
from foredraft.tuning.carousel import REPEATS, Repeat, settle
from foredraft.tuning.costs import Costs, DraftCost, StepCosts, SublayerCosts, Timed, Timings, Turn
from foredraft.tuning.fitting import WIDE, error, fit, too_wide
from foredraft.tuning.forecast import expected_tokens, forecast, speedup_formula
from foredraft.tuning.machine import Counters, Load, LoadMeter


def test_run_lengths() -> None:
    assert run_lengths([[True, True, False, True], []]) == ((2, 1, 0, 1), ())


def test_walk_stops_drafting_where_the_text_must_end() -> None:
    whole = Acceptance(run_lengths([[True] * 7]), 1.0, 16)
    rounds = walk(whole, 4, 8)  # 5 tokens, then 2 are left: one drafted, one bonus
    assert rounds.steps == {1: 1, 4: 1}
    assert rounds.tokens == 7
    early = walk(whole, 4, 100)  # it ended by itself, in the middle of a draft
    assert early.steps == {4: 2}
    assert early.drafted_at == (2, 2, 1, 1)


@pytest.mark.parametrize("alpha", [0.3, 0.7, 0.95])
def test_walk_and_forecast_tend_to_the_formula(alpha: float) -> None:
    source = random.Random(0)
    agree = [[source.random() < alpha for _ in range(4000)] for _ in range(5)]
    acceptance = Acceptance(run_lengths(agree), alpha, 16)
    steps = StepCosts((0, 16), (1.0, 1.0))
    found = forecast(acceptance, DraftCost(0.0, 0.1), steps)
    for gamma in (1, 4, 8):
        assert walk(acceptance, gamma).tokens_per_pass == pytest.approx(expected_tokens([alpha] * gamma), rel=0.03)
        assert found.by_length[gamma] == pytest.approx(speedup_formula(alpha, gamma, 0.1), rel=0.03)
    assert found.speedup == max(found.by_length[1:])
    assert speedup_formula(alpha, 4, 0.1) == pytest.approx((1 - alpha**5) / ((1 - alpha) * (0.4 + 1)))


def test_forecast_prices_wide_passes_and_prompts() -> None:
    acceptance = Acceptance(run_lengths([[True] * 9]), 1.0, 16)
    steps = StepCosts((0, 4), (1.0, 3.0), prefill=2.0)
    found = forecast(acceptance, DraftCost(0.5, 0.25), steps, 10)
    assert found.by_length[2] == pytest.approx((2 + 9) / (2 + 3 * (2.0 + 0.5 + 0.5)))


def test_forecast_prices_what_comes_once_a_text_and_between_steps() -> None:
    acceptance = Acceptance(run_lengths([[True] * 9]), 1.0, 16)
    steps = StepCosts((0, 4), (1.0, 3.0), prefill=2.0, around=0.5)
    found = forecast(acceptance, DraftCost(0.5, 0.25, start=4.0), steps, 10)
    assert found.by_length[2] == pytest.approx((2 + 9 * 1.5) / (2 + 4 + 3 * (2.0 + 0.5 + 0.5 + 0.5)))


def timed(turn: Turn, drafted: int, drafting: float, rest: float) -> Timed:
    return Timed(turn, StepTimes(1, drafted, drafted + 1, 1, drafting, rest, drafting + rest))


def test_fit_finds_the_costs_it_was_fed() -> None:
    truth = SublayerCosts(2e-4, 1e-4, 5e-5, 3e-5)
    free = Repeat()
    steps = [timed(Turn("plain", free, 0), 0, 0, 1e-3)] * 9 + [timed(Turn("repeat", free, 8), 8, 0, 2e-3)] * 9
    family = []
    for attentions, mlps in ((6, 6), (3, 6), (6, 3), (2, 2)):
        turn = Turn(f"{attentions} {mlps}", free, 2, "own", attentions, mlps)
        for d in (2, 6):
            seconds = truth.draft(attentions, mlps).seconds(d)
            family += [timed(turn, d, seconds, 1e-3 + d * 1.25e-4)] * 9
            family += [timed(turn, d, 40 * seconds, 1e-2)] * 3  # somebody else had the machine
    costs = fit(Timings(steps + family), [5])
    for name in ("fixed", "token", "attention", "mlp"):
        assert getattr(costs.sublayers["own"], name) == pytest.approx(getattr(truth, name), rel=1e-3)
    assert costs.steps.step(4) == pytest.approx(1.5e-3)
    assert Costs.from_dict(json.loads(json.dumps(costs.as_dict()))) == costs


def test_prompts_are_priced_by_their_tokens_and_passes() -> None:
    """A prompt cost what its last pass costs, and a draft model read it free of charge."""
    model, plain = Turn("model", Repeat(), 2), Turn("plain", Repeat(), 0)
    found = Timings([timed(plain, 0, 0.0, 1e-3)] * 9 + [timed(model, 2, 2e-3, 1e-3)] * 9)
    found.prefills = [(tokens, 1e-3 + tokens * 1e-5) for tokens in (50, 100, 200) for _ in range(6)]
    found.starts = [replace(timed(model, 2, 2e-3 + n * 2e-6, 1e-3), behind=n) for n in (50, 100, 200)]
    found.around = [1e-4, 1e-4, 9e-4]
    costs = fit(found, [100, 300])  # of which the second takes two passes
    assert costs.steps.prefill == pytest.approx((2e-3 + 2e-3 + 3e-3) / 2)
    assert costs.drafts["model"].start == pytest.approx(200 * 2e-6)
    assert costs.steps.whole(0) == pytest.approx(1.1e-3)
    assert Costs.from_dict(json.loads(json.dumps(costs.as_dict()))) == costs


def times(drafter: Drafter, gamma: int, totals: Iterable[float], name: str = "a") -> list[Timed]:
    turn = Turn(name, drafter, gamma)
    return [Timed(turn, StepTimes(1, gamma, gamma + 1, 1, 0.0, total, total)) for total in totals]


def test_error_falls_with_more_timings_and_grows_with_their_spread() -> None:
    source = random.Random(1)
    few, many = ([source.gauss(1, 0.1) for _ in range(n)] for n in (20, 2000))
    assert error(many) < error(few) < 0.1
    assert error([1.0] * 20) == 0
    assert error([source.uniform(1, 3) for _ in range(20)]) > error(few)
    assert error([1.0, 1.0]) == 1  # two timings tell nothing


def test_error_is_how_far_off_the_low_quantile_is() -> None:
    """Against the truth: the spread of the quantile over many samples."""
    source = random.Random(2)
    samples = [[1 + source.expovariate(4) for _ in range(40)] for _ in range(400)]
    lows = torch.tensor([sorted(sample)[12] for sample in samples])
    told = torch.tensor([error(sample) for sample in samples]).median()
    assert told.item() == pytest.approx((lows.std() / lows.mean()).item(), rel=0.5)


def test_what_scatters_is_timed_again_until_it_does_not() -> None:
    free, source = Repeat(), random.Random(0)
    calm, wild = Turn("calm", free, 2), Turn("wild", free, 2)
    timed: list[Timed] = []
    rides: list[Sequence[Turn]] = []

    def ride(turns: Sequence[Turn]) -> list[Timed]:
        rides.append(turns)
        settled = len(rides) > 2  # whatever else ran has gone
        for turn in turns:
            spread = 0.0 if turn is calm or settled else 1.5
            totals = (1 + source.uniform(0, spread) for _ in range(60 if settled else 12))
            timed.extend(Timed(turn, StepTimes(1, 2, 3, 1, 0.0, total, total)) for total in totals)
        return timed

    settle(ride, [calm, wild], lambda: True)
    assert rides == [[calm, wild], [wild], [wild]]
    assert too_wide(timed) == []


def test_timing_again_has_its_bounds() -> None:
    wild = times(Repeat(), 2, [1, 2, 3, 4, 5, 6, 7])
    rides: list[Sequence[Turn]] = []

    def ride(turns: Sequence[Turn]) -> list[Timed]:
        rides.append(turns)
        return wild

    settle(ride, [wild[0].turn], lambda: True)
    assert len(rides) == 1 + REPEATS
    rides.clear()
    settle(ride, [wild[0].turn], lambda: False)
    assert len(rides) == 1


def test_costs_tell_how_sure_they_are() -> None:
    free = Repeat()
    plain, loud = times(free, 0, [1.0] * 20, "plain"), times(free, 2, [1, 3, 5, 7, 2, 4, 6, 8], "loud")
    costs = fit(Timings([*plain, *loud]), [3], Load(0.5, 0.3))
    assert costs.errors["plain"] == 0 and costs.errors["loud"] > WIDE
    assert costs.load.busy
    assert Costs.from_dict(json.loads(json.dumps(costs.as_dict()))) == costs


# --- the machine ---


@dataclass
class Machine:
    """Two processors; this thread runs `share` of the time, and other processes use `others` processors."""

    share: float = 1.0
    others: float = 0.0
    counted: bool = True
    now: float = 0.0

    def clock(self) -> float:
        self.now += 1e-4
        return self.now

    def meter(self) -> LoadMeter:
        own = lambda: self.now * self.share  # noqa: E731
        counted = lambda: self.now * (self.share + self.others) if self.counted else None  # noqa: E731
        return LoadMeter(Counters(self.clock, own, own, counted, 2))


@pytest.mark.parametrize(
    ("machine", "others", "waited", "busy"),
    [
        (Machine(), 0.0, 0.0, False),
        (Machine(others=0.1), 0.05, 0.0, False),  # a little goes on everywhere
        (Machine(others=1.0), 0.5, 0.0, True),
        (Machine(share=0.6, others=1.4), 0.7, 0.4, True),
        (Machine(share=0.6, counted=False), None, 0.4, True),  # where nobody counts, a busy loop tells
        (Machine(counted=False), None, 0.0, False),
    ],
)
def test_a_busy_machine_is_noticed(machine: Machine, others: float | None, waited: float, busy: bool) -> None:
    meter = machine.meter()
    for _ in range(5):
        meter.sample()
    load = meter.load
    assert load.others == (others if others is None else pytest.approx(others, abs=0.03))
    assert load.waited == pytest.approx(waited, abs=0.05)
    assert load.busy is busy


def test_this_machine_can_be_read() -> None:
    meter = LoadMeter()
    meter.sample()
    load = meter.load
    assert 0 <= load.waited <= 1 and (load.others is None or 0 <= load.others <= 1)
