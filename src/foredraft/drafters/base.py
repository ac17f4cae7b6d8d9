"""Drafter: the interface of everything that guesses tokens ahead.

A drafter may be wrong: that changes how many tokens a pass yields, never which.
"""

from typing import Protocol, runtime_checkable

from foredraft.policy import DraftPolicy
from foredraft.types import Draft, Request, Verdict


@runtime_checkable
class Drafter(Protocol):
    """Proposes one draft for each request: at most `request.draft_limit` tokens, none if it has no guess.

    After each token it asks `policy.go_on` whether another one pays.
    """

    name: str

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]: ...

    def observe(self, request: Request, verdict: Verdict) -> None: ...

    def forget(self, request: Request) -> None:
        """The request has ended; drop what was kept for it."""
        ...


class NoDrafter:
    """Plain decoding: every draft is empty."""

    name = "none"

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        return [Draft()] * len(requests)

    def observe(self, request: Request, verdict: Verdict) -> None:
        pass

    def forget(self, request: Request) -> None:
        pass
