"""The interface of a policy: the engine asks how far to draft, and reports what was accepted and how long it took."""

from collections.abc import Sequence
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


class StopRule(NamedTuple):
    """`go_on` in numbers, for whoever draws whole chains without asking after each token.

    A chain goes on while its survival, its first value times `chances` of each token's confidence (in bins of equal
    width), exceeds shared[depth] / the requests that have gone so far + own[depth].
    """

    survivals: list[float | None]  # by request; None: nothing but its limit ends its chain
    chances: Sequence[float] = (1.0,)
    shared: Sequence[float] = ()  # tokens that another one costs, by its depth: all requests that draft it
    own: Sequence[float] = ()  # and each of them
    sharing: int = 1  # requests that draft a first token


class DraftPolicy(Protocol):
    """Decides how far to draft, from numbers alone.

    One that also has a method `rule(requests, most) -> StopRule | None` lets drafters draw whole chains at once, which
    must end where `go_on` would end them. One that has `rests` (a bool) and `rested(batch, seconds) -> bool` is spared
    most of a step in which it lets nobody draft: while it rests requests do not `start`, and of steps in which each
    request got one token it is told the seconds alone, unless it answers False.
    """

    def start(self, request: Request) -> int:
        """The most tokens to draft in this step; 0 is plain decoding."""
        ...

    def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
        """Whether to draft another token; `confidences` are the drafter's, one for each token of this draft so far."""
        ...

    def observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        """What the target made of a draft that was asked for, if only of none."""
        ...

    def observe_times(self, times: StepTimes) -> None:
        """What a step took in which all requests got tokens."""
        ...

    def forget(self, request: Request) -> None:
        """The request has ended; drop what was kept for it."""
        ...
