"""What is known of each of several drafters, and how those that are not used are tried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from foredraft.policy.base import StepTimes
from foredraft.policy.costs import Average, Costs
from foredraft.policy.plan import Offer
from foredraft.policy.source import MUCH, Blend, Source, margin
from foredraft.types import Draft, Request, Verdict

FORGIVEN = 0.25  # of what a drafter did not keep of its promises, by a trial that went well


@dataclass(slots=True)
class Round:
    """One step of a drafter: for whom it drafted, what that promised and cost, and what became of it."""

    requests: frozenset[Request]
    promised: float  # tokens gained, as expected
    trial: bool = False
    displaced: float = 0.0  # of a trial: tokens that those in whose place it drafted should have gained
    could: int = 0  # of a trial: how many it could draft for
    instead: float = 0.0  # and what these gain otherwise
    seconds: float = 0.0
    step: float = 0.0  # seconds of the whole step, where nobody else drafted
    reading: float = 0.0  # of these: to catch up on the text
    cold: bool = False  # was there much to catch up on?
    first: bool = False  # after a rest
    longest: int = 0
    drafted: int = 0
    tested: int = 0
    right: int = 0

    @property
    def wide(self) -> bool:
        """Whether it drafted for all that it could."""
        return len(self.requests) >= self.could


class Candidate(Source):
    """A drafter that computes: it is judged by how often it was right, and by how much of its promise it kept."""

    def __init__(self, maximum: int) -> None:
        super().__init__(maximum)
        self.round: Round | None = None  # of this step

    def drafted(self, seconds: float, requests: Sequence[Request], longest: int) -> None:
        """Drafting for these took so long, the longest so many tokens."""
        length = max(1, longest)
        known = self.line(len(requests)).at(length)
        unread = [self.reads(request) for request in requests]
        if self.round is not None:  # twice what is usual is something else that ran
            self.round.seconds, self.round.longest = min(seconds, 2 * known) if known else seconds, longest
            self.round.first = self.rested
            if max(unread) > MUCH:
                self.round.cold, self.round.seconds = True, seconds
                self.round.reading = max(0.0, seconds - known)
        self.took(length, seconds, len(requests), unread=unread)

    def learn(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        super().learn(request, draft, verdict)
        if not draft.tokens and not request.lead:  # it was asked in vain
            self.alpha.add(request, 0.0)
        if self.round is not None and request in self.round.requests:
            self.round.drafted += len(draft)
            self.round.tested += min(len(verdict.accepted) + 1, len(draft))
            self.round.right += len(verdict.accepted)

    def end_step(self, times: StepTimes | None = None) -> None:
        super().end_step()
        if times is not None and self.round is not None and self.round.drafted == times.drafted:
            self.round.step = times.total

    def settle(self, costs: Costs, rate: float) -> None:
        """Judge what became of the step before."""
        done, self.round, now = self.round, None, costs.now
        if done is None or not rate:
            return
        count = len(done.requests)
        rows = count * done.longest if now.padded else done.drafted
        free = (now.free_rows - 1) * count
        seconds = done.seconds + max(0, rows - free) * now.row
        if not done.trial:
            if not done.cold:
                self.promised.add(done.promised)
                if done.step:  # what it took in truth, as long as nothing else ran
                    seconds = min(done.step, 2 * now.seconds.value) - now.plain.value
                self.gained.add(done.right - now.plain_rate * seconds)
            return
        cost = seconds - done.reading + done.displaced / rate + now.thaws
        acceptance = done.right / done.tested if done.tested else 0.0
        if done.first and done.right:
            self.hope.add(acceptance)
            self.trials.again(costs.elapsed, cost)
            return
        least = done.instead + margin(done.could)
        gain = self.tried(acceptance, now, rate, done.could, least)
        well = gain * self.trust() > least
        if gain and not well:  # what it did not keep was long ago: it counts less with every good trial
            self.gained.value += FORGIVEN * (self.promised.value - self.gained.value)
        self.trials.made(costs.elapsed, now.plain.value, cost, well=well, reading=done.reading)


class Lookup(Source):
    """A drafter that looks its guess up and tells at once how sure it is: asked first, and judged by its offers."""

    def __init__(self, maximum: int) -> None:
        super().__init__(maximum)
        self.asking = Average()  # seconds, for one request
        self.gains = Blend(Average(0.2, count=8, memory=50))  # tokens that asking gained; at first a guess
        self.trying = False
        self.pays = True  # does asking pay for any request?

    def asks(self, requests: Sequence[Request], costs: Costs) -> list[Request]:
        """For which of these it is worth looking something up; all of them, where a trial is due."""
        worth = [r for r in requests if r.num_draft_tokens is not None or self.gains.of(r) >= 0]
        self.pays = bool(worth)
        self.trying = len(worth) < len(requests) and costs.elapsed >= self.trials.due
        if self.trying:
            return list(requests)
        if worth:
            self.trials.paid(costs.elapsed, costs.now.plain.value)
        return worth

    def offer(self, name: str, request: Request, draft: Draft) -> Offer:
        survivals, survival = [], 1.0
        for index in range(len(request.lead), len(draft)):
            survival *= self.bins.probability(draft.confidences[index]) if draft.confidences else self.alpha.of(request)
            survivals.append(survival)
        return Offer(name, survivals)

    def charge(self, asked: Mapping[Request, float], costs: Costs, rate: float) -> None:
        """These were asked, and what was found for each should gain so much: 0 where it is not used."""
        cost = rate * self.asking.value
        for request, gain in asked.items():
            if not gain:
                self.gains.add(request, -cost)
        if self.trying:
            seconds = self.asking.value * len(asked)
            well = sum(asked.values()) > cost * len(asked)
            self.trials.made(costs.elapsed, costs.now.plain.value, seconds, well=well)

    def forget(self, request: Request) -> None:
        super().forget(request)
        self.gains.own.pop(request, None)
