"""How far to draft, per sequence and step. No tensors, no models: numbers in, a length or a yes or no out.

A policy changes when tokens arrive, never which. Every policy sees the same two questions and the same two reports.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

from foredraft.errors import RequestError
from foredraft.types import Draft, Sequence, Verdict

DEFAULT_NUM_DRAFT_TOKENS = 5


class StepTimes(NamedTuple):
    """What one decoding step took: seconds drafting `drafted` tokens, and verifying `rows` rows."""

    batch: int
    drafted: int
    rows: int
    emitted: int
    drafting: float
    verifying: float
    total: float


class DraftPolicy(Protocol):
    def start(self, sequence: Sequence) -> int:
        """The most tokens to draft in this step; 0 is plain decoding."""
        ...

    def go_on(self, sequence: Sequence, confidences: tuple[float, ...]) -> bool:
        """Draft another token, after tokens of which the drafter was this sure?"""
        ...

    def observe(self, sequence: Sequence, draft: Draft, verdict: Verdict) -> None: ...

    def observe_times(self, times: StepTimes) -> None: ...

    def forget(self, sequence: Sequence) -> None: ...


class Fixed:
    """Always the same length (gamma), but where a subclass gives a sequence one of its own."""

    def __init__(self, num_draft_tokens: int = DEFAULT_NUM_DRAFT_TOKENS) -> None:
        self.num_draft_tokens = num_draft_tokens
        self.lengths: dict[Sequence, int] = {}

    def start(self, sequence: Sequence) -> int:
        return self.lengths.get(sequence, self.num_draft_tokens)

    def go_on(self, sequence: Sequence, confidences: tuple[float, ...]) -> bool:
        return True

    def observe(self, sequence: Sequence, draft: Draft, verdict: Verdict) -> None:
        pass

    def observe_times(self, times: StepTimes) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        self.lengths.pop(sequence, None)


class Heuristic(Fixed):
    """Two more after a draft that was accepted whole, one fewer otherwise (transformers' `heuristic`)."""

    def __init__(self, num_draft_tokens: int = DEFAULT_NUM_DRAFT_TOKENS, maximum: int = 20) -> None:
        super().__init__(num_draft_tokens)
        self.maximum = maximum

    def observe(self, sequence: Sequence, draft: Draft, verdict: Verdict) -> None:
        if draft.tokens:
            step = 2 if verdict.kind == "bonus" else -1
            self.lengths[sequence] = min(self.maximum, max(1, self.start(sequence) + step))


@dataclass(slots=True)
class ThresholdState:
    threshold: float
    acceptance: float


class Threshold(Fixed):
    """Stop after the token whose confidence falls under a threshold that adapts to hold a target acceptance.

    Draft & Verify (Zhang et al., ACL 2024, eq. 5-6) and IPEX-LLM, constants included: after each verification

        AR <- b1 AR + (1 - b1) accepted / drafted
        g~  = g + eps if AR < alpha; g if drafted == num_draft_tokens; g - eps otherwise
        g  <- b2 g + (1 - b2) g~

    The token that fell short is kept and verified: dropping it because of its own probability would bias the text.
    A new request starts from the threshold that earlier ones ended with.
    """

    def __init__(
        self,
        num_draft_tokens: int = 8,
        threshold: float = 0.8,
        *,
        adaptive: bool = True,
        alpha: float = 0.9,
        eps: float = 1e-2,
        b1: float = 0.5,
        b2: float = 0.9,
    ) -> None:
        super().__init__(num_draft_tokens)
        self.threshold, self.adaptive = threshold, adaptive
        self.alpha, self.eps, self.b1, self.b2 = alpha, eps, b1, b2
        self.states: dict[Sequence, ThresholdState] = {}

    def _state(self, sequence: Sequence) -> ThresholdState:
        if sequence not in self.states:
            self.states[sequence] = ThresholdState(self.threshold, self.alpha)
        return self.states[sequence]

    def go_on(self, sequence: Sequence, confidences: tuple[float, ...]) -> bool:
        return confidences[-1] >= self._state(sequence).threshold

    def observe(self, sequence: Sequence, draft: Draft, verdict: Verdict) -> None:
        if not (self.adaptive and draft.tokens):
            return
        state = self._state(sequence)
        rate = len(verdict.accepted) / len(draft)
        state.acceptance = self.b1 * state.acceptance + (1 - self.b1) * rate
        if state.acceptance < self.alpha:
            moved = state.threshold + self.eps
        elif len(draft) == self.num_draft_tokens:
            moved = state.threshold
        else:
            moved = state.threshold - self.eps
        state.threshold = self.b2 * state.threshold + (1 - self.b2) * moved

    def forget(self, sequence: Sequence) -> None:
        super().forget(sequence)
        state = self.states.pop(sequence, None)
        if state is not None:
            self.threshold = state.threshold


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
        """A far outlier (something else ran) counts as twice the average."""
        self.add(min(value, 2 * self.value) if self.count >= 4 and self.value else value)


@dataclass(slots=True)
class RowCost:
    """Seconds of a pass as a line in its rows, by least squares with forgetting."""

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
class Calibration:
    """How often a token drafted with a given confidence is accepted, in ten bins with a prior of their own."""

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
class StepCosts:
    """What steps of one batch size cost, in seconds."""

    batch: int
    plain: Average = field(default_factory=Average)  # a step without drafts
    draft: Average = field(default_factory=Average)  # drafting one token for all that draft
    rows: RowCost = field(default_factory=RowCost)
    free_rows: int = 1  # rows of a sequence that a step without drafts has anyway
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

    def price(self, index: int, sharing: int) -> float:
        """Seconds that the draft token at this index adds to a step, for each of those that draft so far.

        One pass of a drafter serves them all, and all sequences get the rows of the longest draft.
        """
        rows = self.batch if index + 2 > self.free_rows else 0
        return (self.draft.value + rows * self.rows.slope(0.002)) / max(1, sharing)


@dataclass(slots=True)
class Trial:
    """When sequences whose drafts do not pay try one token: all in the same step, which is cheaper in a batch."""

    every: int = 16
    longest: int = 64
    right: int = 0
    made: int = 0

    def count(self, right: bool) -> None:
        self.made += 1
        self.right += right

    def end_step(self) -> None:
        """Sooner again where most of this step's were right, later where they were not."""
        if self.made:
            self.every = 4 if 2 * self.right >= self.made else min(2 * self.every, self.longest)
        self.right = self.made = 0


@dataclass(slots=True)
class Step:
    """What the sequences of the step at hand have decided so far."""

    willing: int = 0
    open: dict[int, int] = field(default_factory=dict)  # by draft length: how many draft beyond it
    longest: int = 0
    trying: set[Sequence] = field(default_factory=set)


class Gain(Fixed):
    """Draft one more token while its expected gain exceeds its measured price; the default.

    The price of a drafted token is what it adds to a step in seconds, at the current rate of tokens; its gain is the
    probability that it and all before it are accepted, from calibrated confidences. Where the best length gains nothing
    over plain decoding nothing is drafted, but for one token now and then (sooner again where that one was right), so
    that drafting comes back. A plain step now and then keeps the comparison honest.
    """

    def __init__(self, maximum: int = 16, plain_every: int = 96) -> None:
        super().__init__(maximum)
        self.plain_every, self.margin = plain_every, 0.02
        self.calibration = Calibration()
        self.costs: dict[int, StepCosts] = {}  # by batch size
        self.batch = 1
        self.steps = 0
        self.step = Step()
        self.willing = 1  # sequences that would draft if all did, in the step before
        self.trial = Trial()
        self.alpha = Average(0.6, count=8, memory=200)  # acceptance of the next token, over all; at first a guess
        self.alphas: defaultdict[Sequence, Average] = defaultdict(partial(Average, memory=30))

    def start(self, sequence: Sequence) -> int:
        costs = self._costs()
        if costs.plain.count < 2 or self.steps % self.plain_every == self.plain_every - 1:
            return 0
        alpha = self._alpha(sequence)
        self.step.willing += self._pays(alpha, costs, self.batch)
        if not costs.draft.count or self._pays(alpha, costs, self.willing):
            return self._open(self.num_draft_tokens)
        cheap = 100 * costs.rate * costs.price(0, self.batch)  # so that trials cost a hundredth of the time at most
        if self.steps % max(1, min(self.trial.every, round(cheap))):
            return 0
        self.step.trying.add(sequence)
        return self._open(1)

    def _open(self, limit: int) -> int:
        self.step.open[0] = self.step.open.get(0, 0) + 1
        return limit

    def go_on(self, sequence: Sequence, confidences: tuple[float, ...]) -> bool:
        survival = self._alpha(sequence)
        for confidence in confidences:
            survival *= self.calibration.probability(confidence)
        costs, depth, open = self._costs(), len(confidences), self.step.open
        go_on = survival > costs.rate * costs.price(depth, open.get(depth - 1, 1))
        open[depth] = open.get(depth, 0) + go_on
        return go_on

    def observe(self, sequence: Sequence, draft: Draft, verdict: Verdict) -> None:
        own = self.alphas[sequence]
        reached = min(len(verdict.accepted) + 1, len(draft))
        for i in range(reached):
            hit = i < len(verdict.accepted)
            self.alpha.add(hit)
            own.add(hit)
            if draft.confidences:
                self.calibration.add(draft.confidences[i], hit)
        self.step.longest = max(self.step.longest, len(draft))
        if draft.tokens and sequence in self.step.trying:
            self.trial.count(bool(verdict.accepted))

    def observe_times(self, times: StepTimes) -> None:
        self.steps += 1
        self.trial.end_step()
        self.batch = times.batch
        self._costs().add(times, self.step.longest)
        self.willing = self.step.willing
        self.step = Step()

    def forget(self, sequence: Sequence) -> None:
        self.alphas.pop(sequence, None)

    def _costs(self) -> StepCosts:
        if self.batch not in self.costs:
            self.costs[self.batch] = StepCosts(self.batch)
        return self.costs[self.batch]

    def _alpha(self, sequence: Sequence) -> float:
        """Acceptance of the next token, of this sequence where it has shown some, of all otherwise."""
        own = self.alphas.get(sequence)
        if own is None:
            return self.alpha.value
        weight = own.count / (own.count + 8)
        return weight * own.value + (1 - weight) * self.alpha.value

    def _pays(self, alpha: float, costs: StepCosts, sharing: int) -> bool:
        """Whether the best draft length brings more tokens than plain decoding makes of the same time."""
        rate = self.batch / costs.plain.value
        total, survival = 0.0, 1.0
        for index in range(self.num_draft_tokens):
            survival *= alpha
            total += survival - rate * costs.price(index, sharing)
            if total > self.margin:
                return True
        return False


class PerRequest:
    """Gives a request that asked for a draft length exactly that, and leaves every other to a policy."""

    def __init__(self, policy: DraftPolicy) -> None:
        self.policy = policy

    def start(self, sequence: Sequence) -> int:
        return self.policy.start(sequence) if sequence.num_draft_tokens is None else sequence.num_draft_tokens

    def go_on(self, sequence: Sequence, confidences: tuple[float, ...]) -> bool:
        return sequence.num_draft_tokens is not None or self.policy.go_on(sequence, confidences)

    def observe(self, sequence: Sequence, draft: Draft, verdict: Verdict) -> None:
        if sequence.num_draft_tokens is None:
            self.policy.observe(sequence, draft, verdict)

    def observe_times(self, times: StepTimes) -> None:
        self.policy.observe_times(times)

    def forget(self, sequence: Sequence) -> None:
        self.policy.forget(sequence)


POLICIES: dict[str, Callable[[], DraftPolicy]] = {
    "gain": Gain,
    "fixed": Fixed,
    "heuristic": Heuristic,
    "threshold": Threshold,
}


def make_policy(policy: str | DraftPolicy | None) -> DraftPolicy:
    """A policy by name, as given, or the default.

    Raises:
        RequestError: no policy has that name.
    """
    if policy is None:
        return Gain()
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise RequestError(f"policy={policy!r} is not known; use one of {', '.join(POLICIES)}")
    return POLICIES[policy]()
