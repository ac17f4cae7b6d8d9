"""A decoding loop without tensors: draft and acceptance as random processes, time as a sum of given costs."""

from dataclasses import dataclass
from random import Random

from foredraft.policy import DraftPolicy, StepTimes
from foredraft.types import Draft, Request, SamplingParams, Verdict

MIN_ROWS = 4


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


@dataclass
class Clock:
    seconds: float = 0.0
    tokens: int = 0
    drafted: int = 0
    steps: int = 0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def run(world: World, policy: DraftPolicy, tokens: int = 6000, seed: int = 0, length: int = 300) -> list[Clock]:
    """Decode so many tokens per request of the batch; a clock for each of the world's phases."""
    source = Random(seed)
    clocks = []
    requests = [fresh() for _ in range(world.batch)]
    for alpha in world.alphas:
        clock = Clock()
        while clock.tokens < tokens * world.batch / len(world.alphas):
            step(world, policy, requests, alpha, source, clock)
            for i, request in enumerate(requests):
                if request.num_output > length:
                    policy.forget(request)
                    requests[i] = fresh()
        clocks.append(clock)
    return clocks


def fresh() -> Request:
    return Request([1], SamplingParams(), seed=0, stop_rule=lambda token: False)


@dataclass
class Chain:
    """One request's draft while it grows; the simulation knows how much of it is right."""

    request: Request
    open: bool
    confidences: tuple[float, ...] = ()
    accepted: int = 0
    right: bool = True

    def grow(self, chance: float, told: float, limit: int, policy: DraftPolicy, source: Random) -> None:
        self.right = self.right and source.random() < chance
        self.accepted += self.right
        self.confidences += (told,)
        self.open = len(self.confidences) < limit and policy.go_on(self.request, self.confidences)

    def draft(self) -> Draft:
        return Draft((0,) * len(self.confidences), "simulated", confidences=self.confidences)


def step(
    world: World, policy: DraftPolicy, requests: list[Request], alpha: float, source: Random, clock: Clock
) -> None:
    """One step as the engine makes it: chains grow in lockstep, and all requests get the rows of the longest."""
    limits = {s: policy.start(s) for s in requests}
    chains = [Chain(s, limits[s] > 0) for s in requests]
    drafting = 0.0
    while active := [chain for chain in chains if chain.open]:
        drafting += world.draft_cost * shared(world, len(active))
        for chain in active:
            chance = source.betavariate(2 * alpha, 2 * (1 - alpha)) if world.knows else alpha
            chain.grow(chance, chance if world.knows else 0.5, limits[chain.request], policy, source)
    for chain in chains:
        kind = "bonus" if chain.accepted == len(chain.confidences) else "recovered"
        chain.request.token_ids += [0] * (chain.accepted + 1)
        policy.observe(chain.request, chain.draft(), Verdict(tuple(range(chain.accepted)), 0, kind))
    emitted = sum(chain.accepted + 1 for chain in chains)
    drafted = sum(len(chain.confidences) for chain in chains)
    width = max(MIN_ROWS, 1 + max(len(chain.confidences) for chain in chains))
    jitter = 1e-3 * (1 + world.noise * source.uniform(-1, 1))
    verifying = jitter * (shared(world, len(requests)) + world.row_cost * (width - MIN_ROWS) * len(requests))
    total = jitter * (drafting + world.fixed_cost) + verifying
    rows = width * len(requests)
    policy.observe_times(StepTimes(len(requests), drafted, rows, emitted, drafting * jitter, verifying, total))
    clock.seconds += total
    clock.tokens += emitted
    clock.drafted += drafted
    clock.steps += 1


def shared(world: World, batch: int) -> float:
    return 1 + world.share_of_batch * (batch - 1)
