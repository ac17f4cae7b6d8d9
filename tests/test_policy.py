"""Draft-length policies: the reference systems' rules to the letter, and the default's promise in simulated worlds."""

from dataclasses import replace
from itertools import product

import pytest
from simulation import Kind, World, fresh, run, run_with

from foredraft.errors import RequestError
from foredraft.policy import (
    POLICIES,
    Choice,
    Fixed,
    Gain,
    Heuristic,
    PerRequest,
    StepTimes,
    Threshold,
    make_policy,
)
from foredraft.policy.costs import Average, Costs, Line
from foredraft.policy.source import TRIED, ConfidenceBins
from foredraft.types import Draft, Verdict

LENGTHS = (0, 1, 2, 4, 8, 16)
SEEDS = range(3)


def observe(policy, request, drafted: int, accepted: int) -> None:
    kind = "bonus" if accepted == drafted else "recovered"
    policy.observe(request, Draft((0,) * drafted), Verdict(tuple(range(accepted)), 0, kind))


# Rules with a name


def test_fixed_never_changes():
    policy, request = Fixed(3), fresh()
    for drafted, accepted in ((3, 0), (3, 3), (0, 0)):
        observe(policy, request, drafted, accepted)
        assert policy.start(request) == 3
        assert policy.go_on(request, (0.01,))


def test_heuristic_adds_two_after_a_whole_draft_and_takes_one_otherwise():
    policy, request, other = Heuristic(5, maximum=8), fresh(), fresh()
    lengths = []
    for accepted in (5, 7, 8, 0, 0):
        observe(policy, request, policy.start(request), accepted)
        lengths.append(policy.start(request))
    assert lengths == [7, 8, 8, 7, 6]
    for _ in range(9):
        observe(policy, request, policy.start(request), 0)
    assert policy.start(request) == 1
    observe(policy, request, 0, 0)  # nothing was drafted: nothing is learnt
    assert policy.start(request) == 1
    assert policy.start(other) == 5
    policy.forget(request)
    assert policy.start(request) == 5


def test_threshold_follows_both_updates_to_the_letter():
    """Draft & Verify, auto_parameters [1, 0.5, 0.9, 1e-2, 0.9], worked by hand."""
    policy, request = Threshold(8, 0.8), fresh()
    acceptance, threshold = 0.9, 0.8
    for drafted, accepted in ((8, 8), (4, 4), (8, 7), (3, 0), (8, 8), (2, 2), (5, 5), (8, 8), (4, 4), (4, 4), (8, 8)):
        observe(policy, request, drafted, accepted)
        acceptance = 0.5 * acceptance + 0.5 * accepted / drafted
        if acceptance < 0.9:
            moved = threshold + 0.01
        elif drafted == 8:
            moved = threshold
        else:
            moved = threshold - 0.01
        threshold = 0.9 * threshold + 0.1 * moved
        state = policy.states[request]
        assert (state.acceptance, state.threshold) == pytest.approx((acceptance, threshold), abs=1e-12)


def test_threshold_moves_each_way():
    def after(drafted: int, accepted: int) -> float:
        policy, request = Threshold(8, 0.8), fresh()
        observe(policy, request, drafted, accepted)
        return policy.states[request].threshold

    assert after(4, 4) == pytest.approx(0.799)  # all right with room to spare: draft further
    assert after(8, 8) == pytest.approx(0.8)  # all right at full length: stay
    assert after(8, 2) == pytest.approx(0.801)  # too many wrong: stop sooner


def test_threshold_keeps_the_token_that_fell_short_and_stops_after_it():
    policy, request = Threshold(8, 0.8, adaptive=False), fresh()
    confidences: tuple[float, ...] = ()
    for confidence in (0.95, 0.8, 0.79, 0.99):
        confidences += (confidence,)
        if not policy.go_on(request, confidences):
            break
    assert confidences == (0.95, 0.8, 0.79)
    observe(policy, request, 3, 0)
    assert not policy.go_on(request, (0.79,)) and policy.go_on(request, (0.8,))


def test_threshold_is_carried_to_the_next_request():
    policy, first = Threshold(8, 0.8), fresh()
    for _ in range(50):
        observe(policy, first, 4, 0)
    learnt = policy.states[first].threshold
    assert learnt > 0.82
    policy.forget(first)
    assert policy.go_on(second := fresh(), (learnt,)) and not policy.go_on(second, (learnt - 1e-6,))


def test_a_request_that_asked_for_a_length_gets_it_and_teaches_nothing():
    inner = Heuristic(5)
    policy, asked, free = PerRequest(inner), fresh(), fresh()
    asked.num_draft_tokens = 3
    for _ in range(4):
        observe(policy, asked, 3, 0)
        observe(policy, free, 5, 0)
    assert (policy.start(asked), policy.start(free)) == (3, 1)
    assert policy.go_on(asked, (0.0,))
    asked.num_draft_tokens = 0
    assert policy.start(asked) == 0


def test_policies_by_name():
    assert isinstance(make_policy(None), Gain)
    assert {name: type(make_policy(name)) for name in POLICIES} == {
        "gain": Gain,
        "fixed": Fixed,
        "heuristic": Heuristic,
        "threshold": Threshold,
    }
    own = Fixed(2)
    assert make_policy(own) is own
    with pytest.raises(RequestError, match=r"policy='best' is not known; use one of gain, fixed"):
        make_policy("best")


# What the default measures with


def test_an_average_of_hits_and_misses_is_their_share():
    """Clipping outliers, right for costs, would make 0 a trap: one hit after many misses must count as one."""
    average = Average(memory=100)
    for i in range(1000):
        average.add(i % 10 == 9)
    assert average.value == pytest.approx(0.1, abs=0.01)
    zero = Average()
    for hit in [0] * 10 + [1] * 200:
        zero.add(hit)
    assert zero.value > 0.95


def test_a_cost_that_something_else_caused_counts_little():
    average = Average()
    for _ in range(20):
        average.add_cost(1.0)
    average.add_cost(1000.0)
    assert average.value < 1.1


def test_a_line_is_what_one_more_costs():
    rows = Line(before=0.0)
    for i in range(60):
        rows.add(4 + i % 5, 1.0 + 0.25 * (4 + i % 5))
    assert rows.slope == pytest.approx(0.25, rel=0.05)
    for _ in range(2000):
        rows.add(6, 2.5)
    assert rows.slope == pytest.approx(0.25, rel=0.05)  # equal passes say nothing new
    assert rows.at(8) == pytest.approx(3.0, rel=0.05)
    assert (Line().slope, Line().at(3)) == (0.0, 0.0)


def test_a_line_stays_between_nothing_and_what_a_unit_costs():
    flat, steep = Line(), Line()
    for i in range(60):
        flat.add(1 + i % 4, 2.0)
        steep.add(1 + i % 4, (1 + i % 4) ** 2)
    assert 0 < flat.slope < 0.05 and flat.at(1) == pytest.approx(2.0, rel=0.05)
    assert steep.slope == pytest.approx(steep.y / steep.x)


def test_one_disturbed_pass_among_the_first_is_forgotten():
    """Its slope stayed for good once no more was drafted: trials of few tokens were too few to be believed."""
    rows = Line(before=0.0)
    for count, seconds in ((1, 1.0), (1, 1.0), (6, 9.0)):
        rows.add(count, seconds)
    assert rows.slope > 1
    for i in range(1000):
        count = 3 if i % 50 == 0 else 1
        rows.add(count, 0.9 + 0.1 * count)
    assert rows.slope < 0.25


def test_so_many_of_the_same_are_as_one_by_one():
    for memory, before, times in ((30, 0, 5), (30, 28, 7), (8, 40, 3), (200, 1, 0)):
        one, all_ = Average(0.6, 8, memory), Average(0.6, 8, memory)
        for _ in range(before):
            one.add(0.25), all_.add(0.25)
        for _ in range(times):
            one.add(1.0)
        all_.add_same(1.0, times)
        assert (all_.count, all_.value) == (one.count, pytest.approx(one.value, abs=1e-12))


def test_calibration_learns_what_a_confidence_is_worth():
    calibration = ConfidenceBins()
    assert calibration.probability(0.95) == pytest.approx(0.95)
    for i in range(400):
        calibration.add([0.95], i % 2)
    assert calibration.probability(0.95) == pytest.approx(0.5, abs=0.02)
    assert calibration.probability(0.05) == pytest.approx(0.05)
    assert calibration.probability(1.0) == calibration.probability(0.95)


# The default


def mean_rate(world: World, make, tokens: int) -> float:
    """Tokens per second over all seeds: one run of 3,000 tokens is off by some 3 %."""
    clocks = [run(world, make(), tokens, seed)[0] for seed in SEEDS]
    return sum(clock.tokens for clock in clocks) / sum(clock.seconds for clock in clocks)


def best_fixed(world: World, tokens: int) -> float:
    """Tokens per second of plain decoding (length 0) or the best fixed length, known in hindsight."""
    return max(mean_rate(world, lambda length=length: Fixed(length), tokens) for length in LENGTHS)


WORLDS = [
    World(draft_cost, row_cost, (alpha,), knows)
    for draft_cost, row_cost, alpha in product((0.0, 0.1, 0.3, 0.55), (0.0, 0.15), (0.1, 0.6, 0.95))
    for knows in ((True, False) if row_cost else (True,))
]


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: f"{w.draft_cost}-{w.row_cost}-{w.alphas[0]}-{w.knows}")
def test_never_slower_than_plain_decoding_or_the_best_fixed_length(world):
    rate = mean_rate(world, Gain, 2000)
    assert rate >= 0.97 * mean_rate(world, lambda: Fixed(0), 2000)
    assert rate >= 0.96 * best_fixed(world, 2000)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("draft_cost", [0.0, 0.1, 0.3, 0.55])
def test_nor_in_a_batch(draft_cost, alpha):
    world = World(draft_cost, 0.02, (alpha,), batch=4)
    rate = mean_rate(world, Gain, 500)
    assert rate >= 0.97 * mean_rate(world, lambda: Fixed(0), 500)
    assert rate >= 0.92 * best_fixed(world, 500)  # one length for all suits a batch in lockstep, known beforehand


# What a fast runtime is like: passes so short that beginning a draft costs more than a token of it, caches go cold.
FAST = World(0.13, 0.15, (0.92,), min_rows=1, padded=False, begin_cost=0.4, cold_cost=0.4, first_cost=5.0)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.8, 0.92])
@pytest.mark.parametrize("batch", [1, 4])
def test_nor_where_beginning_a_draft_is_what_costs(alpha, batch):
    """Its tokens are cheap: priced alike, drafts stay so short that each is dear."""
    world = replace(FAST, alphas=(alpha,), batch=batch)
    rate = mean_rate(world, Gain, 2000 // batch)
    assert rate >= 0.96 * mean_rate(world, lambda: Fixed(0), 2000 // batch)
    assert rate >= 0.9 * best_fixed(world, 2000 // batch)


# As a Zen 4 is: behind a draft model the target's passes take half as long again, and the plain steps after it recover.
COLD = World(0.09, 0.09, (0.5,), min_rows=1, padded=False, begin_cost=0.3, cold_cost=0.3, thaw_cost=0.8,
             thaw_decay=0.75, noise=0.08, share_of_batch=0.3)  # fmt: skip


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("policy", [Gain, Choice])
def test_nor_where_a_draft_leaves_the_caches_cold(policy, batch, alpha):
    """Plain steps right after drafts are no measure of plain decoding, and trials cost what they leave behind."""
    world = replace(COLD, alphas=(alpha,), batch=batch)
    kind = Kind("model", (alpha,), world.draft_cost, begin=world.begin_cost, cold=world.cold_cost)
    look = Kind("look", (alpha / 3,), 0.01, looks_up=True, finds=0.3)
    kinds = [kind] if policy is Gain else [look, kind]
    tokens = 3000 // batch
    rates = [run_with(kinds, world, policy(), tokens, seed)[0].rate for seed in range(4)]
    plain = mean_rate(world, lambda: Fixed(0), tokens)
    assert sum(rates) / len(rates) >= 0.94 * plain
    assert alpha < 0.9 or sum(rates) / len(rates) >= 1.4 * plain


# Eight texts on a Zen 4: arithmetic is what a pass takes, so that a row of a draft costs a quarter of a text's pass.
DEAR_ROWS = World(0.1, 0.26, share_of_batch=0.3, padded=False, min_rows=1, begin_cost=0.3, cold_cost=0.3, thaw_cost=0.1,
                  thaw_decay=0.75, noise=0.08)  # fmt: skip


def over_plain(world: World, make, tokens: int = 800, seeds=range(4)) -> float:
    """Tokens a second over plain decoding's, the mean of some runs of texts of 128 tokens."""
    model = Kind("model", world.alphas, world.draft_cost, begin=world.begin_cost, cold=world.cold_cost, catch_up=0.03)
    look = Kind("look", (world.alphas[0] / 3,), 0.03, looks_up=True, finds=0.3)
    kinds = [model] if make is Gain else [look, model]
    ratios = []
    for seed in seeds:
        plain = run_with(kinds, world, Fixed(0), tokens, seed, 128)[0]
        ratios.append(run_with(kinds, world, make(), tokens, seed, 128)[0].rate / plain.rate)
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("alpha", [0.05, 0.7])
@pytest.mark.parametrize("batch", [4, 8])
@pytest.mark.parametrize("policy", [Gain, Choice])
def test_where_rows_are_dear_a_trial_is_for_one_of_a_batch(policy, batch, alpha):
    """Tried by all at once it took up to 5 % of a run of some hundred steps to know that it does not pay."""
    assert over_plain(replace(DEAR_ROWS, alphas=(alpha,), batch=batch), policy) >= 0.97
    assert over_plain(replace(DEAR_ROWS, alphas=(alpha,), batch=batch, mood=0.4), policy) >= 0.97


@pytest.mark.parametrize(("alpha", "least"), [(0.95, 1.1), (0.98, 1.2)])
def test_a_choice_keeps_drafting_while_it_pays(alpha, least):
    """It stopped for thirty steps whenever it had gone well: at the rate of good steps drafts seem to gain nothing."""
    assert over_plain(replace(DEAR_ROWS, alphas=(alpha,), batch=4), Choice) >= least


def test_plain_decoding_is_measured_in_warm_caches_before_drafts_are_believed_to_double_it():
    """Measured right behind drafts it seemed to take two thirds longer, and drafts that lost to pay."""
    costs, plain = Costs(), 0
    for step in range(64):
        due = costs.plain_is_due
        plain += due
        behind = 0.7 * 0.85**costs.run if step > 2 else 0.0
        tokens, took = (4, 1e-3 * (1 + behind)) if due else (20, 2.7e-3)
        costs.add(StepTimes(4, 0 if due else 16, 4 if due else 20, tokens, 0.0 if due else 5e-4, took, took))
    assert plain >= 10  # those at first, and a run long enough to warm up
    assert costs.now.plain.value < 1.25e-3


def test_in_a_batch_an_old_price_of_plain_decoding_does_not_outvote_a_new_one():
    """Known from hundreds of steps in a slow minute it stood for the next ones, in which drafts lost a fifth to it."""
    costs = Costs()

    def step(seconds: float, drafted: int = 0) -> None:
        costs.add(StepTimes(4, drafted, 4 + drafted, 4 + drafted // 2, 0.0, seconds, seconds))

    for _ in range(200):
        step(1.0e-3)
    for _ in range(40):
        step(2.5e-3, drafted=12)
    for _ in range(10):
        step(0.7e-3)
    assert costs.now.plain.value < 0.85e-3


@pytest.mark.parametrize("policy", [Gain, Choice])
@pytest.mark.parametrize("seed", range(6))
def test_what_was_learned_while_others_computed_is_forgotten(policy, seed):
    """Drafting was put off for thousands of tokens: its price stayed what it was, as hardly anything was drafted."""
    world = replace(COLD, alphas=(0.9, 0.9, 0.9), busy_steps=40)
    kinds = [Kind("model", world.alphas, world.draft_cost, begin=world.begin_cost, cold=world.cold_cost)]
    *_, late = run_with(kinds, world, policy(), 1500, seed)
    assert late.rate > 0.75 * run_with(kinds, replace(world, busy_steps=0), policy(), 1500, seed)[-1].rate


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("world", [World(draft_cost=0.4, alphas=(0.6,)), World(0.3, alphas=(0.5,), batch=4)])
def test_a_draft_that_was_quick_by_chance_does_not_say_what_the_next_takes(world, seed):
    """One of twenty made all the others forgotten, and the price that was then too low made drafts look bad."""
    plain = run(world, Fixed(0), 6000, seed)[0].rate
    assert run(replace(world, quick_share=0.05), Gain(), 6000, seed)[0].rate > 1.06 * plain


def test_what_is_told_of_a_rest_in_brief_is_learned_when_it_ends():
    brief, whole = Costs(), Costs()
    for costs in (brief, whole):
        for _ in range(20):
            costs.add(StepTimes(1, 0, 1, 1, 0.0, 1.0, 1.0))
    for _ in range(8):
        whole.add(StepTimes(1, 0, 1, 1, 0.0, 2.0, 2.0))
        assert brief.rest(1, 2.0)
    assert brief.elapsed == whole.elapsed and brief.now.plain.value == 1.0
    assert brief.wake() == 8 and brief.wake() == 0
    assert brief.now.steps == whole.now.steps and brief.run == whole.run
    assert brief.now.plain.value == pytest.approx(whole.now.plain.value, rel=0.05)
    assert brief.now.rate == pytest.approx(whole.now.rate, rel=0.1)
    assert brief.now.rows.at(1) == pytest.approx(whole.now.rows.at(1), rel=1e-6)
    assert not brief.rest(2, 2.0)  # another batch
    brief.add(StepTimes(1, 3, 4, 2, 0.5, 1.0, 1.5))
    assert not brief.rest(1, 2.0)  # caches may be cold


@pytest.mark.parametrize("policy", [Gain, Choice])
def test_a_first_draft_that_takes_long_says_little(policy):
    """It loads the drafter into the caches; drafting was put off for a whole text by it."""
    early = run_with([Kind("model", (0.92,), 0.13, begin=0.4, cold=0.4, first=20.0)], FAST, policy(), 150)[0]
    assert early.drafted / early.steps > 3


def test_drafts_when_it_pays_and_stops_when_it_does_not():
    good, bad = (run(World(0.3, 0.02, (alpha,)), Gain(), 3000)[0] for alpha in (0.9, 0.1))
    assert good.drafted / good.steps > 2
    assert bad.drafted / bad.steps < 0.1


def test_a_cheap_drafter_gets_another_chance_soon():
    """A bad first draft says little, and trying again costs nothing."""
    policy = Gain()
    run(World(0.001, 0.0, (0.02,)), policy, 100)
    late = run(World(0.001, 0.0, (0.8,)), policy, 150)[0]
    assert late.drafted / late.steps > 3


@pytest.mark.parametrize("batch", [1, 4])
def test_comes_back_when_acceptance_recovers(batch):
    worlds = [World(0.3, 0.02, (alpha,), batch=batch) for alpha in (0.9, 0.05, 0.9)]
    phases = run(World(0.3, 0.02, (0.9, 0.05, 0.9), batch=batch), Gain(), 4500)
    for world, phase in zip(worlds, phases, strict=True):
        assert phase.rate >= 0.9 * best_fixed(world, 500)
    assert phases[1].drafted / phases[1].steps / batch < 0.15
    assert phases[2].drafted / phases[2].steps / batch > 2


class Asked(Gain):
    """Counts how often it let a request draft."""

    asked = 0

    def start(self, request):
        length = super().start(request)
        self.asked += length > 0
        return length


@pytest.mark.parametrize(("batch", "finds", "least"), [(1, 0.0, 0.97), (8, 0.0, 0.97), (1, 0.05, 1.1)])
def test_a_drafter_that_finds_nothing_is_hardly_asked(batch, finds, least):
    """Looking up costs little, but it costs it in every step: 4 % of random texts, of which nothing came."""
    world, count, policy = replace(FAST, batch=batch), 2000 // batch, Asked()
    seldom, often = (Kind("lookup", (0.9,), 0.08, finds=share, looks_up=True) for share in (finds, 0.8))
    clock = run_with([seldom], world, policy, count)[0]
    assert clock.rate >= least * run(world, Fixed(0), count)[0].rate
    assert finds or policy.asked < 0.5 * clock.steps * batch
    late, at_once = (run_with([often], world, own, count)[0].rate for own in (policy, Gain()))
    assert late > 0.95 * at_once  # and it is back once there is something to find


@pytest.mark.parametrize(("batch", "share"), [(1, 0.15), (8, 0.1)])
def test_where_nothing_pays_a_batch_hardly_works_it_out(batch, share):
    """It takes as long as a request's share of a short pass, for each request."""

    class Counting(Gain):
        times = 0

        def _gains(self, request):
            self.times += 1
            return super()._gains(request)

    policy, world = Counting(), World(0.3, 0.02, (0.05,), batch=batch)
    clock = run(world, policy, 400)[0]
    assert policy.times <= share * clock.steps * batch


@pytest.mark.parametrize("policy", [Gain(), Choice()])
def test_drafters_need_not_ask_at_every_depth(policy):
    """One that drafts by way of text may ask of three tokens when the others have ended after one."""
    first, second = fresh(), fresh()
    for request in (first, second):
        policy.start(request)
    for request, confidences in ((first, (0.0,)), (second, (0.0,)), (second, (1.0, 1.0)), (first, (1.0, 1.0, 1.0))):
        policy.go_on(request, confidences)


def test_nothing_is_kept_of_a_request_that_ended():
    policy = Gain()
    run(World(), policy, tokens=2000, length=50)
    assert len(policy.source.alpha.own) <= 1


class Stubborn(Gain):
    """A planted fault: never looks again once drafting has not paid."""

    def start(self, request):
        length = super().start(request)
        return 0 if length == TRIED else length


def test_planted_fault_a_gate_that_never_reopens_is_found():
    world = World(0.3, 0.02, (0.05, 0.9))
    stubborn, sound = (run(world, policy, 6000)[1].rate for policy in (Stubborn(), Gain()))
    assert stubborn < 0.8 * sound


@pytest.mark.parametrize("policy", [Gain(), Choice()])
def test_a_step_that_also_reads_a_prompt_teaches_nothing(policy):
    """Its rows and seconds are the prompt's: one such step made drafts look free of charge."""
    for _ in range(4):
        policy.observe_times(StepTimes(1, 0, 1, 1, 0.0, 1.0, 1.0))
    policy.observe_times(StepTimes(1, 0, 65, 1, 0.0, 9.0, 9.0, read=64))
    now = policy.costs.now
    assert (now.free_rows, now.plain.value, now.padded) == (1, 1.0, False)
