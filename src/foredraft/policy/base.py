"""The interface of a policy: the engine asks how far to draft, and reports what was accepted and how long it took."""

from typing import NamedTuple, Protocol

from foredraft.types import Draft, Request, Verdict


class StepTimes(NamedTuple):
    """One decoding step of a batch: what was drafted, verified and emitted, and the seconds of each part."""

    batch: int
    drafted: int
    rows: int
    emitted: int
    drafting: float
    verifying: float
    total: float
    read: int = 0  # tokens of prompts: the step's rows and seconds are then not those of decoding


class DraftPolicy(Protocol):
    """Decides how far to draft, from numbers alone."""

    def start(self, request: Request) -> int:
        """The most tokens to draft in this step; 0 is plain decoding."""
        ...

    def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
        """Whether to draft another token; `confidences` are the drafter's, one for each token of this draft so far."""
        ...

    def observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        """What the target made of a draft."""
        ...

    def observe_times(self, times: StepTimes) -> None:
        """What a step took in which all requests got tokens."""
        ...

    def forget(self, request: Request) -> None:
        """The request has ended; drop what was kept for it."""
        ...
