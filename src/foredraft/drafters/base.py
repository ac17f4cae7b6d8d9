"""Drafter: the seam for everything that guesses tokens ahead.

A drafter may be as wrong as it likes: it changes how many tokens a pass yields, never which.
"""

from typing import Protocol, runtime_checkable

from foredraft.policy import DraftPolicy
from foredraft.types import Draft, Request, Verdict


@runtime_checkable
class Drafter(Protocol):
    """Proposes one draft for each request, at most `request.draft_limit` tokens long, empty where it has no guess.

    While drafting it asks `policy.go_on` after each token whether another one pays.
    """

    name: str

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        """One draft for each request, in their order."""
        ...

    def observe(self, request: Request, verdict: Verdict) -> None:
        """What the target made of the request's draft; its tokens are committed."""
        ...

    def forget(self, request: Request) -> None:
        """The request has ended; drop what was kept for it."""
        ...


class NoDrafter:
    """Plain decoding: an empty draft for everybody."""

    name = "none"

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        return [Draft()] * len(requests)

    def observe(self, request: Request, verdict: Verdict) -> None:
        pass

    def forget(self, request: Request) -> None:
        pass
