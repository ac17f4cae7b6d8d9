"""Fixed rules: a constant length, transformers' heuristic, Draft & Verify's confidence threshold."""

from dataclasses import dataclass

from foredraft.policy.base import StepTimes
from foredraft.types import Draft, Request, Verdict

DEFAULT_NUM_DRAFT_TOKENS = 5


class Fixed:
    """Always the same length (gamma), unless a subclass sets one for a request in `lengths`."""

    def __init__(self, num_draft_tokens: int = DEFAULT_NUM_DRAFT_TOKENS) -> None:
        self.num_draft_tokens = num_draft_tokens
        self.lengths: dict[Request, int] = {}

    def start(self, request: Request) -> int:
        return self.lengths.get(request, self.num_draft_tokens)

    def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
        return True

    def observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        pass

    def observe_times(self, times: StepTimes) -> None:
        pass

    def forget(self, request: Request) -> None:
        self.lengths.pop(request, None)


class Heuristic(Fixed):
    """Two more after a draft that was accepted whole, one fewer otherwise (transformers' `heuristic`)."""

    def __init__(self, num_draft_tokens: int = DEFAULT_NUM_DRAFT_TOKENS, maximum: int = 20) -> None:
        super().__init__(num_draft_tokens)
        self.maximum = maximum

    def observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        if draft.tokens:
            step = 2 if verdict.kind == "bonus" else -1
            self.lengths[request] = min(self.maximum, max(1, self.start(request) + step))


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

    The token whose confidence was too low is still verified: dropping it because of its own probability would bias the
    text. A new request starts with the threshold that the last one ended with.
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
        self.states: dict[Request, ThresholdState] = {}

    def _state(self, request: Request) -> ThresholdState:
        if request not in self.states:
            self.states[request] = ThresholdState(self.threshold, self.alpha)
        return self.states[request]

    def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
        return confidences[-1] >= self._state(request).threshold

    def observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        if not (self.adaptive and draft.tokens):
            return
        state = self._state(request)
        rate = len(verdict.accepted) / len(draft)
        state.acceptance = self.b1 * state.acceptance + (1 - self.b1) * rate
        if state.acceptance < self.alpha:
            moved = state.threshold + self.eps
        elif len(draft) == self.num_draft_tokens:
            moved = state.threshold
        else:
            moved = state.threshold - self.eps
        state.threshold = self.b2 * state.threshold + (1 - self.b2) * moved

    def forget(self, request: Request) -> None:
        super().forget(request)
        state = self.states.pop(request, None)
        if state is not None:
            self.threshold = state.threshold
