"""What every policy is asked and told: how far to draft, and what came of it. No tensors, no models."""

from typing import NamedTuple, Protocol

from foredraft.types import Draft, Request, Verdict


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
    """Decides how far to draft, from numbers alone."""

    def start(self, request: Request) -> int:
        """The most tokens to draft in this step; 0 is plain decoding."""
        ...

    def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
        """Draft another token, after tokens of which the drafter was this sure?"""
        ...

    def observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        """What the target made of a draft."""
        ...

    def observe_times(self, times: StepTimes) -> None:
        """What a step took in which all requests were decoding."""
        ...

    def forget(self, request: Request) -> None:
        """The request has ended; drop what was kept for it."""
        ...
