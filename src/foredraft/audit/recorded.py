"""Drafts as far as they once were: what a policy decided from measured times, to be repeated where there are others."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from foredraft.policy import Choice, StepTimes, StopRule
from foredraft.policy.plan import Pick
from foredraft.types import Draft, Request, Verdict


class Drafted(NamedTuple):
    """What was drafted for one pass of a request: how much was allowed, how much it was, and by whom."""

    limit: int
    length: int
    source: str


NONE = Drafted(0, 0, "none")
FORCED = "forced+"  # how a source's name begins where its draft goes on from forced tokens


class Recorded(Choice):
    """Lets each request draft as far as it did, and the drafter draft that did; it learns nothing."""

    def __init__(self, drafts: Mapping[Request, Sequence[Drafted]] | None = None) -> None:
        super().__init__()
        self.drafts = drafts or {}
        self.names: list[str] = []

    def now(self, request: Request) -> Drafted:
        """What was drafted for the pass that comes next."""
        drafts, place = self.drafts.get(request, ()), request.stats.target_passes
        return drafts[place] if place < len(drafts) else NONE

    def start(self, request: Request) -> int:
        it = self.now(request)
        return it.limit if it.length > len(request.lead) else 0

    def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
        it = self.now(request)
        lead = len(request.lead) if it.source.startswith(FORCED) else 0  # draft models are sure of these unasked
        return lead + len(confidences) < it.length

    def rule(self, requests: list[Request], most: int) -> StopRule | None:
        return None

    def know(self, lookups: Sequence[str], candidates: Sequence[str]) -> None:
        self.names = [*lookups, *candidates]

    def who(self, request: Request) -> str | None:
        """Of several drafters the one; before a forced token's all the same, so the first."""
        it = self.now(request)
        name = it.source.removeprefix(FORCED)
        return (name if name in self.names else self.names[0]) if it.length else None

    def asks(self, name: str, requests: Sequence[Request]) -> list[Request]:
        return [request for request in requests if self.who(request) == name]

    def choose(self, requests: Sequence[Request], drafts: Mapping[str, Mapping[Request, Draft]]) -> dict[Request, Pick]:
        picks = {}
        for request in requests:
            name = self.who(request)
            if name is not None and (name not in drafts or request in drafts[name]):
                picks[request] = Pick(name, length=self.now(request).length - len(request.lead))
        return picks

    def took(self, name: str, seconds: float, requests: Sequence[Request], longest: int) -> None:
        pass

    def observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        pass

    def observe_times(self, times: StepTimes) -> None:
        pass

    def forget(self, request: Request) -> None:
        pass
