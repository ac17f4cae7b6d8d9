"""Several drafters as one: in each step, each request's draft comes from the drafter that promises it most.

Those that look up are asked first, since that costs next to nothing; then the policy chooses, and those that compute
draft for the requests that chose them, in one go. Under a policy that does not choose, the first that has a draft wins.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

from foredraft.drafters import forced
from foredraft.drafters.base import Drafter
from foredraft.drafters.memory import SuffixMemory
from foredraft.drafters.suffix import SuffixDrafter
from foredraft.models.base import Cache
from foredraft.policy import Choice, DraftPolicy, Fixed
from foredraft.types import Draft, Request, Verdict


class Several:
    """Drafters by name. A drafter that is not chosen does nothing until it is: it reads the text it missed then.

    Args:
        drafters: with names that differ; at equal promise an earlier one is preferred.
        reasons: why each is there, for reports.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        reasons: Sequence[str] = (),
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.drafters = {drafter.name: drafter for drafter in drafters}
        self.name = ", ".join(self.drafters)
        self.reasons = dict(zip(self.drafters, reasons, strict=False))
        self.lookups = [name for name, it in self.drafters.items() if getattr(it, "looks_up", False)]
        self.others = [name for name in self.drafters if name not in self.lookups]
        self.all = Fixed()  # as far as a lookup goes
        self.clock = clock
        self.spent: dict[str, float] = {}  # seconds of this step, by drafter
        self.chosen: dict[Request, str] = {}  # who drafted in this step

    @property
    def steady(self) -> str:
        """The one whose drafts depend on a request alone, where there is one: not on what others said before."""
        return (self.others or self.lookups)[0]

    @property
    def weight_bytes(self) -> int:
        return sum(getattr(drafter, "weight_bytes", 0) for drafter in self.drafters.values())

    @property
    def cache_bytes(self) -> int:
        return sum(getattr(drafter, "cache_bytes", 0) for drafter in self.drafters.values())

    @property
    def caches(self) -> list[Cache]:
        return [cache for drafter in self.drafters.values() for cache in getattr(drafter, "caches", ())]

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        self.spent, self.chosen = {}, {}
        choice = getattr(policy, "policy", policy)
        if isinstance(choice, Choice):
            drafts = self._chosen(requests, policy, choice)
        else:
            drafts = self._first(requests, policy)
        return [drafts.get(request) or Draft(source=self.name) for request in requests]

    def _chosen(self, requests: list[Request], policy: DraftPolicy, choice: Choice) -> dict[Request, Draft]:
        choice.know(self.lookups, self.others)
        offers = {}
        for name in self.lookups:
            asked = choice.asks(name, _may(requests, name))
            if asked:
                offers[name] = self._ask(name, asked, self.all, choice)
        picks = choice.choose(requests, offers)
        drafts = {}
        for request, pick in picks.items():
            if pick.name in offers:
                draft = _cut(offers[pick.name][request], len(request.lead) + pick.length)
                drafts[request] = self._keep(pick.name, request, draft)
        for name in self.others:
            group = [request for request, pick in picks.items() if pick.name == name]
            if group:
                found = self._ask(name, group, policy, choice)
                drafts.update({request: self._keep(name, request, draft) for request, draft in found.items()})
        return drafts

    def _first(self, requests: list[Request], policy: DraftPolicy) -> dict[Request, Draft]:
        drafts: dict[Request, Draft] = {}
        for name in self.drafters:
            group = [request for request in _may(requests, name) if request not in drafts]
            found = self._ask(name, group, policy) if group else {}
            drafts.update({r: self._keep(name, r, draft) for r, draft in found.items() if draft.tokens})
        return drafts

    def _ask(
        self, name: str, requests: list[Request], policy: DraftPolicy, choice: Choice | None = None
    ) -> dict[Request, Draft]:
        began = self.clock()
        drafts = forced.propose(self.drafters[name], requests, policy)
        self.spent[name] = self.clock() - began
        if choice is not None:
            choice.took(name, self.spent[name], requests, max(map(len, drafts)))
        return dict(zip(requests, drafts, strict=True))

    def _keep(self, name: str, request: Request, draft: Draft) -> Draft:
        self.chosen[request] = name
        return draft

    def observe(self, request: Request, verdict: Verdict) -> None:
        """The one that drafted hears what became of it."""
        name = self.chosen.get(request)
        if name is not None:
            self.drafters[name].observe(request, verdict)

    def forget(self, request: Request) -> None:
        self.chosen.pop(request, None)
        for drafter in self.drafters.values():
            drafter.forget(request)


def drafters_of(drafter: Drafter) -> list[Drafter]:
    """All that draft: those of several, or the one."""
    return list(drafter.drafters.values()) if isinstance(drafter, Several) else [drafter]


def forget_outputs(drafter: Drafter) -> None:
    """Draft from no earlier request's output from here on: for measurements that ask the same again."""
    for one in drafters_of(drafter):
        if isinstance(one, SuffixDrafter):
            one.memory = None


@contextmanager
def without_memory(drafter: Drafter, *, anew: bool = False) -> Iterator[None]:
    """Draft from no earlier request's output until the block ends.

    Nothing is remembered of what is said in it, or, `anew`, until its end.
    """
    kept = [(one, one.memory) for one in drafters_of(drafter) if isinstance(one, SuffixDrafter)]
    for one, memory in kept:
        one.memory = SuffixMemory(memory.vocab_size) if anew and memory is not None else None
    try:
        yield
    finally:
        for one, memory in kept:
            one.memory = memory


def _may(requests: Iterable[Request], name: str) -> list[Request]:
    return [request for request in requests if request.drafter in (None, name)]


def _cut(draft: Draft, length: int) -> Draft:
    if length >= len(draft):
        return draft
    return Draft(draft.tokens[:length], draft.source, confidences=draft.confidences[:length])
