"""How far to draft, per sequence and step. No tensors, no models: numbers in, a length or a yes or no out.

A policy changes when tokens arrive, never which. Every policy sees the same two questions and the same two reports.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from foredraft.errors import RequestError
from foredraft.types import Draft, Sequence, Verdict

DEFAULT_NUM_DRAFT_TOKENS = 5


@dataclass(frozen=True, slots=True)
class StepTimes:
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
    """Always the same length (gamma)."""

    def __init__(self, num_draft_tokens: int = DEFAULT_NUM_DRAFT_TOKENS) -> None:
        self.num_draft_tokens = num_draft_tokens

    def start(self, sequence: Sequence) -> int:
        return self.num_draft_tokens

    def go_on(self, sequence: Sequence, confidences: tuple[float, ...]) -> bool:
        return True

    def observe(self, sequence: Sequence, draft: Draft, verdict: Verdict) -> None:
        pass

    def observe_times(self, times: StepTimes) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        pass


class Heuristic(Fixed):
    """Two more after a draft that was accepted whole, one fewer otherwise (transformers' `heuristic`)."""

    def __init__(self, num_draft_tokens: int = DEFAULT_NUM_DRAFT_TOKENS, maximum: int = 20) -> None:
        super().__init__(num_draft_tokens)
        self.maximum = maximum
        self.lengths: dict[Sequence, int] = {}

    def start(self, sequence: Sequence) -> int:
        return self.lengths.get(sequence, self.num_draft_tokens)

    def observe(self, sequence: Sequence, draft: Draft, verdict: Verdict) -> None:
        if draft.tokens:
            step = 2 if verdict.kind == "bonus" else -1
            self.lengths[sequence] = min(self.maximum, max(1, self.start(sequence) + step))

    def forget(self, sequence: Sequence) -> None:
        self.lengths.pop(sequence, None)


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
        return self.states.setdefault(sequence, ThresholdState(self.threshold, self.alpha))

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
        state = self.states.pop(sequence, None)
        if state is not None:
            self.threshold = state.threshold


@dataclass(slots=True)
class Average:
    """An exponential moving average that starts as the plain mean; a far outlier counts as twice the average."""

    value: float = 0.0
    count: int = 0
    memory: int = 40

    def add(self, value: float) -> None:
        if self.count >= 4:
            value = min(value, 2 * self.value)
        self.count += 1
        self.value += (value - self.value) / min(self.count, self.memory)


@dataclass(slots=True)
class RowCost:
    """Seconds of a pass as a line in its rows, by least squares with forgetting."""

    decay: float = 0.98
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


class Gain(Fixed):
    """Draft one more token while its expected gain exceeds its measured price; the default.

    The price of a drafted token is its share of drafting time and one more row to verify, in tokens at the current
    rate; its gain is the probability that it and all before it are accepted, from calibrated confidences. Whether to
    draft at all compares the best draft's tokens per second with plain decoding's. When drafting does not pay, one
    step in `explore_every` drafts all the same, so that it can come back.
    """

    def __init__(self, maximum: int = 16, explore_every: int = 48) -> None:
        super().__init__(maximum)
        self.explore_every = explore_every
        self.calibration = Calibration()
        self.draft_cost, self.plain_cost, self.other_cost = Average(), Average(), Average()
        self.rate = Average(memory=20)
        self.rows = RowCost()
        self.alphas: dict[Sequence, Average] = {}
        self.alpha = Average(memory=200)
        self.idle = 0

    def _alpha(self, sequence: Sequence) -> float:
        """Acceptance of the next token, of this sequence where it has shown some, of all otherwise."""
        own = self.alphas.get(sequence)
        prior = self.alpha.value if self.alpha.count else 0.7
        if own is None:
            return prior
        weight = own.count / (own.count + 8)
        return weight * own.value + (1 - weight) * prior

    def start(self, sequence: Sequence) -> int:
        if not self.draft_cost.count or self._pays(self._alpha(sequence)):
            self.idle = 0
            return self.num_draft_tokens
        self.idle += 1
        if self.idle >= self.explore_every:
            self.idle = 0
            return 2
        return 0

    def _pays(self, alpha: float) -> bool:
        plain = self.plain_cost.value or self.other_cost.value
        tokens, survival, best = 1.0, 1.0, 0.0
        row = self.rows.slope(0.01)
        for n in range(1, self.num_draft_tokens + 1):
            survival *= alpha
            tokens += survival
            best = max(best, tokens / (plain + n * (self.draft_cost.value + row)))
        return best * plain > 1.02

    def go_on(self, sequence: Sequence, confidences: tuple[float, ...]) -> bool:
        survival = self._alpha(sequence)
        for confidence in confidences:
            survival *= self.calibration.probability(confidence)
        return survival > self.rate.value * (self.draft_cost.value + self.rows.slope(0.01))

    def observe(self, sequence: Sequence, draft: Draft, verdict: Verdict) -> None:
        own = self.alphas.setdefault(sequence, Average(memory=60))
        reached = min(len(verdict.accepted) + 1, len(draft))
        for i in range(reached):
            hit = i < len(verdict.accepted)
            self.alpha.add(hit)
            own.add(hit)
            if draft.confidences:
                self.calibration.add(draft.confidences[i], hit)

    def observe_times(self, times: StepTimes) -> None:
        if times.drafted:
            self.draft_cost.add(times.drafting / times.drafted)
        else:
            self.plain_cost.add(times.total)
        self.other_cost.add(times.total - times.drafting)
        self.rows.add(times.rows, times.verifying)
        self.rate.add(times.emitted / times.total)

    def forget(self, sequence: Sequence) -> None:
        self.alphas.pop(sequence, None)


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
