"""A decoding loop without tensors: draft and acceptance as random processes, time as a sum of given costs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from random import Random

from foredraft.drafters.base import Drafter
from foredraft.drafters.several import Several
from foredraft.policy import Choice, DraftPolicy, Fixed, StepTimes
from foredraft.types import Draft, Request, SamplingParams, Verdict

MIN_ROWS = 4
HELD = (0.0, 0.0, 0.0, 15.0, 60.0)  # what another process' turn adds to a pass
RIGHT, WRONG = 1, 0  # the tokens of a draft
LENGTH = 300  # tokens of a text


@dataclass(frozen=True)
class World:
    """Costs in units of one plain pass of one request; how often the drafter is right, and whether it knows."""

    draft_cost: float = 0.1  # of one token
    row_cost: float = 0.02  # of one more row to verify
    alphas: tuple[float, ...] = (0.8,)  # one after another, each for an equal share of the tokens
    knows: bool = True  # confidences tell right from wrong; else they are all alike
    fixed_cost: float = 0.05  # of a step, whatever it does
    noise: float = 0.05
    batch: int = 1
    share_of_batch: float = 0.1  # what another request adds to a pass
    padded: bool = True  # all requests get the rows of the longest draft
    min_rows: int = MIN_ROWS  # of a request, whatever it drafts
    begin_cost: float = 0.0  # of a draft, whatever its length
    cold_cost: float = 0.0  # of a draft after a step without one: the caches hold little of the drafter
    first_cost: float = 0.0  # of the first draft of all
    thaw_cost: float = 0.0  # of a pass behind a drafter that computes: the caches hold little of the target
    thaw_decay: float = 0.5  # of that in each pass after it
    hard_share: float = 0.0  # of the requests, whose drafts are right only
    hard: float = 0.0  # times as often
    quick_share: float = 0.0  # of the drafts, which take a tenth
    busy_steps: int = 0  # so many at first in which other processes run now and then
    prompt: int = 1  # tokens that a text begins with
    mood: float = 0.0  # by how much all takes longer for a while, because others use the machine
    mood_lasts: float = 0.05  # seconds, on average, that it does and does not

    def shared(self, batch: int) -> float:
        return 1 + self.share_of_batch * (batch - 1)


@dataclass(frozen=True)
class Kind:
    """What a simulated drafter is like; its world's phases give an alpha each."""

    name: str
    alphas: tuple[float, ...]
    cost: float = 0.1  # of one token, or of asking where it looks up
    knows: bool = True
    finds: float = 1.0  # how often it has a draft
    looks_up: bool = False
    catch_up: float = 0.0  # of a token that it has not seen yet
    begin: float = 0.0  # of a draft
    cold: float = 0.0  # of a draft after a step without one
    first: float = 0.0  # of the first draft of all


class Moods:
    """How long everything takes at each time, whatever is decoded then."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.source = world, Random(seed + 1000)
        self.until, self.slow = 0.0, False

    def at(self, seconds: float) -> float:
        while self.world.mood and seconds >= self.until:
            self.until += self.source.expovariate(1 / self.world.mood_lasts)
            self.slow = not self.slow
        return 1.0 + self.world.mood * self.slow


@dataclass
class Clock:
    seconds: float = 0.0
    tokens: int = 0
    drafted: int = 0
    steps: int = 0
    cold: float = 0.0
    by: dict[str, int] = field(default_factory=dict)  # steps by who drafted

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Chain:
    """One request's draft while it grows."""

    request: Request
    open: bool
    told: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Guesser:
    """A drafter that is right by chance, and takes its time on a clock that all share."""

    def __init__(self, world: World, kind: Kind, source: Random, now: list[float]) -> None:
        self.name, self.looks_up = kind.name, kind.looks_up
        self.world, self.kind, self.source, self.now = world, kind, source, now
        self.alpha = kind.alphas[0]
        self.seen: dict[Request, int] = {}
        self.eases: dict[Request, float] = {}  # what a request makes of the acceptance
        self.last: float | None = None  # the step in which it drafted

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        chains = [Chain(request, self._finds(request)) for request in requests]
        if self.looks_up:
            self.now[0] += self.kind.cost * len(requests)
        self._catch_up(requests)
        self._warm_up()
        while active := [chain for chain in chains if chain.open]:
            if not self.looks_up:
                self.now[0] += self.kind.cost * self.world.shared(len(active))
            for chain in active:
                self._grow(chain, policy)
        return [Draft(tuple(chain.tokens), self.name, confidences=tuple(chain.told)) for chain in chains]

    def _warm_up(self) -> None:
        """What a draft costs beyond its tokens."""
        kind, now = self.kind, self.now[1]
        rested = self.last is not None and self.last < now - 1
        self.now[0] += kind.begin + (kind.first if self.last is None else kind.cold if rested else 0.0)
        self.last = now

    def _finds(self, request: Request) -> bool:
        return request.draft_limit > 0 and (self.kind.finds == 1 or self.source.random() < self.kind.finds)

    def _catch_up(self, requests: list[Request]) -> None:
        for request in requests:
            behind = len(request.token_ids) - self.seen.get(request, 0)
            self.now[0] += self.kind.catch_up * behind
            self.seen[request] = len(request.token_ids)

    def _grow(self, chain: Chain, policy: DraftPolicy) -> None:
        alpha, knows = self.alpha * self._ease(chain.request), self.kind.knows
        chance = self.source.betavariate(2 * alpha, 2 * (1 - alpha)) if knows else alpha
        chain.tokens.append(RIGHT if self.source.random() < chance else WRONG)
        chain.told.append(chance if knows else 0.5)
        more = len(chain.tokens) < chain.request.draft_limit
        chain.open = more and policy.go_on(chain.request, tuple(chain.told))

    def _ease(self, request: Request) -> float:
        if request not in self.eases:
            hard = self.world.hard_share > 0 and self.source.random() < self.world.hard_share
            self.eases[request] = self.world.hard if hard else 1.0
        return self.eases[request]

    def observe(self, request: Request, verdict: Verdict) -> None:
        pass

    def forget(self, request: Request) -> None:
        self.seen.pop(request, None)
        self.eases.pop(request, None)


def run(world: World, policy: DraftPolicy, tokens: int = 6000, seed: int = 0, length: int = LENGTH) -> list[Clock]:
    """Decode so many tokens per request of the batch with one drafter; a clock for each of the world's phases."""
    return run_with(
        [
            Kind(
                "simulated",
                world.alphas,
                world.draft_cost,
                world.knows,
                begin=world.begin_cost,
                cold=world.cold_cost,
                first=world.first_cost,
            )
        ],
        world,
        policy,
        tokens,
        seed,
        length,
    )


def run_with(
    kinds: Sequence[Kind], world: World, policy: DraftPolicy, tokens: int = 6000, seed: int = 0, length: int = LENGTH
) -> list[Clock]:
    """The same with these drafters."""
    source, now = Random(seed), [0.0, 0]  # seconds of drafting, steps
    guessers = [Guesser(world, kind, source, now) for kind in kinds]
    drafter = guessers[0] if len(guessers) == 1 else Several(guessers, clock=lambda: now[0] * 1e-3)
    clocks: list[Clock] = []
    moods = Moods(world, seed)
    requests = [fresh(length, world.prompt) for _ in range(world.batch)]
    phases = max(len(kind.alphas) for kind in kinds)
    for phase in range(phases):
        clock = Clock()
        for guesser in guessers:
            guesser.alpha = guesser.kind.alphas[min(phase, len(guesser.kind.alphas) - 1)]
        while clock.tokens < tokens * world.batch / phases:
            mood = moods.at(sum(done.seconds for done in clocks) + clock.seconds)
            step(world, policy, drafter, requests, source, now, clock, mood)
            for i, request in enumerate(requests):
                if request.num_output > length:
                    policy.forget(request)
                    drafter.forget(request)
                    requests[i] = fresh(length, world.prompt)
        clocks.append(clock)
    return clocks


def fresh(length: int = LENGTH, prompt: int = 1) -> Request:
    return Request([1] * prompt, SamplingParams(max_new_tokens=length), seed=0, stop_rule=lambda token: False)


def step(
    world: World,
    policy: DraftPolicy,
    drafter: Drafter,
    requests: list[Request],
    source: Random,
    now: list[float],
    clock: Clock,
    mood: float = 1.0,
) -> None:
    """One step as the engine makes it."""
    now[1] += 1
    rests = getattr(policy, "rests", False)
    for request in requests:
        request.draft_limit = 0 if rests else policy.start(request)
    began = now[0]
    drafts = dict.fromkeys(requests, Draft())
    wanting = [request for request in requests if request.draft_limit > 0]
    if wanting:
        drafts.update(zip(wanting, drafter.propose(wanting, policy), strict=True))
    emitted = drafted = 0
    for request, draft in drafts.items():
        accepted = draft.tokens.index(WRONG) if WRONG in draft.tokens else len(draft)
        request.token_ids += [0] * (accepted + 1)
        kind = "bonus" if accepted == len(draft) else "recovered"
        verdict = Verdict(tuple(range(accepted)), 0, kind)
        if request.draft_limit:
            drafter.observe(request, verdict)
            policy.observe(request, draft, verdict)
        emitted, drafted = emitted + accepted + 1, drafted + len(draft)
        who = draft.source if draft.tokens else "none"
        clock.by[who] = clock.by.get(who, 0) + 1
    count = len(requests)
    width = max(world.min_rows, 1 + max(map(len, drafts.values())))
    more = (width - world.min_rows) * count if world.padded else drafted
    rows = width * count if world.padded else drafted + count
    jitter = 1e-3 * mood * (1 + world.noise * source.uniform(-1, 1))
    clock.cold = 1.0 if _computed(drafter, now[1]) else world.thaw_decay * clock.cold
    thaw = world.thaw_cost * world.shared(count) * clock.cold
    verifying = jitter * (world.shared(count) + thaw + world.row_cost * more)
    drafting = now[0] - began
    if world.quick_share and source.random() < world.quick_share:
        drafting *= 0.1
    if now[1] <= world.busy_steps:
        drafting += source.choice(HELD) if wanting else 0.0
        verifying += 1e-3 * source.choice(HELD)
    total = jitter * (drafting + world.fixed_cost) + verifying
    if not (rests and policy.rested(count, total)):  # type: ignore[attr-defined]
        policy.observe_times(StepTimes(count, drafted, rows, emitted, drafting * jitter, verifying, total))
    clock.seconds += total
    clock.tokens += emitted
    clock.drafted += drafted
    clock.steps += 1


def _computed(drafter: Drafter, step: float) -> bool:
    """Whether a drafter has pushed the target's weights out of the caches in this step."""
    parts = drafter.drafters.values() if isinstance(drafter, Several) else [drafter]
    return any(not it.looks_up and it.last == step for it in parts)  # type: ignore[attr-defined]


def best_in_hindsight(kinds: Sequence[Kind], world: World, lengths: Sequence[int], tokens: int) -> list[float]:
    """Exhaustive: for each phase, the tokens a second of the best drafter at its best fixed length, or of none.

    A drafter that looks up is given its own drafts as long as they are likely.
    """
    phases = max(len(kind.alphas) for kind in kinds)
    best = [0.0] * phases
    for kind, length in [(kinds[0], 0), *product(kinds, lengths)]:
        for phase in range(phases):
            own = replace(kind, alphas=(kind.alphas[min(phase, len(kind.alphas) - 1)],))
            best[phase] = max(best[phase], run_with([own], world, Fixed(length), tokens)[0].rate)
    return best


__all__ = ["Choice", "Clock", "Kind", "World", "best_in_hindsight", "fresh", "run", "run_with"]
