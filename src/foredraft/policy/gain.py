"""The default policy: draft one more token while what it is expected to bring exceeds what it costs."""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial

from foredraft.policy.base import StepTimes, StopRule
from foredraft.policy.rules import Fixed
from foredraft.types import Draft, Request, Verdict


@dataclass(slots=True)
class Average:
    """An exponential moving average that starts as the plain mean."""

    value: float = 0.0
    count: int = 0
    memory: int = 40

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, self.memory)

    def add_cost(self, value: float) -> None:
        """Add a time; one that is far too long, because something else ran, counts as twice the average."""
        self.add(min(value, 2 * self.value) if self.count >= 4 and self.value else value)


@dataclass(slots=True)
class RowCost:
    """A line fitted to the seconds of a pass over its rows: least squares, where older passes weigh less."""

    decay: float = 0.99
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)

    def add(self, rows: int, seconds: float) -> None:
        terms = (1.0, rows, seconds, rows * rows, rows * seconds)
        self.sums = [self.decay * old + new for old, new in zip(self.sums, terms, strict=True)]

    def slope(self, floor: float) -> float:
        """Seconds that one more row costs, at least `floor` times the average pass."""
        n, x, y, xx, xy = self.sums
        if not n:
            return 0.0
        spread = xx - x * x / n
        fitted = (xy - x * y / n) / spread if spread > 0.5 else 0.0
        return max(fitted, floor * y / n)


@dataclass(slots=True)
class ConfidenceBins:
    """How often tokens of a given confidence were accepted, counted in ten bins. An empty bin trusts the drafter."""

    bins: int = 10
    memory: float = 0.995
    accepted: list[float] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accepted = [2 * (i + 0.5) / self.bins for i in range(self.bins)]
        self.seen = [2.0] * self.bins

    def _bin(self, confidence: float) -> int:
        return min(self.bins - 1, max(0, int(confidence * self.bins)))

    def add(self, confidence: float, accepted: bool) -> None:
        i = self._bin(confidence)
        self.accepted[i] = self.memory * self.accepted[i] + accepted
        self.seen[i] = self.memory * self.seen[i] + 1

    def probability(self, confidence: float) -> float:
        i = self._bin(confidence)
        return self.accepted[i] / self.seen[i]


@dataclass(slots=True)
class BatchCosts:
    """What steps of one batch size cost, in seconds, as averages over the steps seen so far."""

    batch: int
    plain: Average = field(default_factory=Average)  # a step without drafts
    draft: Average = field(default_factory=Average)  # drafting one token for all that draft
    rows: RowCost = field(default_factory=RowCost)
    free_rows: int = 1  # rows of a request that a step without drafts has anyway
    emitted: Average = field(default_factory=lambda: Average(memory=20))
    seconds: Average = field(default_factory=lambda: Average(memory=20))

    def add(self, times: StepTimes, longest: int) -> None:
        if longest:
            self.draft.add_cost(times.drafting / longest)
        else:
            self.plain.add_cost(times.total)
            self.free_rows = times.rows // times.batch
        self.rows.add(times.rows, times.total - times.drafting)
        self.emitted.add(times.emitted)
        self.seconds.add_cost(times.total)

    @property
    def rate(self) -> float:
        """Tokens per second of the latest steps, drafted or not."""
        return self.emitted.value / self.seconds.value if self.seconds.value else 0.0

    def cost(self, index: int) -> float:
        """Seconds that the draft token at this index adds to a step.

        One pass of the drafter serves all requests. Every request is padded to the rows of the longest draft.
        """
        rows = self.batch if index + 2 > self.free_rows else 0
        return self.draft.value + rows * self.rows.slope(0.002)

    def price(self, index: int, sharing: int) -> float:
        """`cost`, divided by the requests that draft this token."""
        return self.cost(index) / max(1, sharing)


@dataclass(slots=True)
class Exploration:
    """When requests whose drafts do not pay try one token again.

    All of them try in the same step, since in a batch that costs less than one after another.
    """

    every: int = 16
    longest: int = 64
    right: int = 0
    made: int = 0

    def count(self, right: bool) -> None:
        self.made += 1
        self.right += right

    def end_step(self) -> None:
        """Try again sooner if most of this step's tokens were accepted, later otherwise."""
        if self.made:
            self.every = 4 if 2 * self.right >= self.made else min(2 * self.every, self.longest)
        self.right = self.made = 0


@dataclass(slots=True)
class Step:
    """What the requests have decided so far in this step."""

    willing: int = 0
    open: dict[int, int] = field(default_factory=dict)  # by draft length: how many draft beyond it
    longest: int = 0
    trying: set[Request] = field(default_factory=set)


class Gain(Fixed):
    """Draft one more token while its expected gain exceeds its measured price; the default.

    The price of a drafted token is what it adds to a step in seconds, at the current rate of tokens; its gain is the
    probability that it and all before it are accepted, from calibrated confidences. If no length gains anything over
    plain decoding, nothing is drafted except one token now and then (sooner again if that one was accepted), so that
    drafting can come back. A plain step now and then keeps the price of plain decoding up to date.
    """

    def __init__(self, maximum: int = 16, plain_every: int = 96) -> None:
        super().__init__(maximum)
        self.plain_every, self.margin = plain_every, 0.02
        self.bins = ConfidenceBins()
        self.costs: dict[int, BatchCosts] = {}  # by batch size
        self.batch = 1
        self.steps = 0
        self.step = Step()
        self.willing = 1  # requests that would draft if all did, in the step before
        self.exploration = Exploration()
        self.alpha = Average(0.6, count=8, memory=200)  # acceptance of the next token, over all; at first a guess
        self.alphas: defaultdict[Request, Average] = defaultdict(partial(Average, memory=30))

    def start(self, request: Request) -> int:
        costs = self._costs()
        if costs.plain.count < 2 or self.steps % self.plain_every == self.plain_every - 1:
            return 0
        alpha = self._alpha(request)
        self.step.willing += self._pays(alpha, costs, self.batch)
        if not costs.draft.count or self._pays(alpha, costs, self.willing):
            return self._open(self.num_draft_tokens)
        cheap = 100 * costs.rate * costs.price(0, self.batch)  # so that trials cost a hundredth of the time at most
        if self.steps % max(1, min(self.exploration.every, round(cheap))):
            return 0
        self.step.trying.add(request)
        return self._open(1)

    def _open(self, limit: int) -> int:
        self.step.open[0] = self.step.open.get(0, 0) + 1
        return limit

    def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
        survival = self._alpha(request)
        for confidence in confidences:
            survival *= self.bins.probability(confidence)
        costs, depth, open = self._costs(), len(confidences), self.step.open
        go_on = survival > costs.rate * costs.price(depth, open.get(depth - 1, 1))
        open[depth] = open.get(depth, 0) + go_on
        return go_on

    def rule(self, requests: list[Request], most: int) -> StopRule | None:
        if type(self).go_on is not Gain.go_on:
            return None
        costs = self._costs()
        chances = [accepted / seen for accepted, seen in zip(self.bins.accepted, self.bins.seen, strict=True)]
        survivals: list[float | None] = [self._alpha(request) for request in requests]
        return StopRule(survivals, chances, list(map(costs.cost, range(most))), costs.rate, self.step.open.get(0, 1))

    def observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        own = self.alphas[request]
        reached = min(len(verdict.accepted) + 1, len(draft))
        for i in range(reached):
            hit = i < len(verdict.accepted)
            self.alpha.add(hit)
            own.add(hit)
            if draft.confidences:
                self.bins.add(draft.confidences[i], hit)
        self.step.longest = max(self.step.longest, len(draft))
        if draft.tokens and request in self.step.trying:
            self.exploration.count(bool(verdict.accepted))

    def observe_times(self, times: StepTimes) -> None:
        self.steps += 1
        self.exploration.end_step()
        self.batch = times.batch
        self._costs().add(times, self.step.longest)
        self.willing = self.step.willing
        self.step = Step()

    def forget(self, request: Request) -> None:
        self.alphas.pop(request, None)

    def _costs(self) -> BatchCosts:
        if self.batch not in self.costs:
            self.costs[self.batch] = BatchCosts(self.batch)
        return self.costs[self.batch]

    def _alpha(self, request: Request) -> float:
        """How likely the next token is accepted: the average of all requests, later more and more this request's."""
        own = self.alphas.get(request)
        if own is None:
            return self.alpha.value
        weight = own.count / (own.count + 8)
        return weight * own.value + (1 - weight) * self.alpha.value

    def _pays(self, alpha: float, costs: BatchCosts, sharing: int) -> bool:
        """Whether some draft length gives more tokens than plain decoding would in the same time."""
        rate = self.batch / costs.plain.value
        total, survival = 0.0, 1.0
        for index in range(self.num_draft_tokens):
            survival *= alpha
            total += survival - rate * costs.price(index, sharing)
            if total > self.margin:
                return True
        return False
