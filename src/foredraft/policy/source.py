"""What is known of one drafter: how often it is right, what it asks, whether it pays, and when it is tried again."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from foredraft.policy.base import StopRule
from foredraft.policy.costs import Average, BatchCosts, Line
from foredraft.types import Draft, Request, Verdict

MARGIN = 0.02  # tokens a step by which a draft has to beat plain decoding
TOGETHER = 0.08  # the same for each of several requests
SHARE = 0.01  # of the time that trials may take
SOON = 4  # steps between the first trials
RARE = 32  # steps from one trial to the next, and more
TRIED = 3  # tokens of a trial, at most
DEAR = 16  # times what it takes to read a text that is too long: the first wait until that is done all the same
MUCH = 24  # tokens to read: more than one draft


@dataclass(slots=True)
class ConfidenceBins:
    """How often tokens of a given confidence were accepted, counted in ten bins. An empty bin trusts the drafter."""

    bins: int = 10
    memory: float = 0.995
    accepted: list[float] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accepted = [2 * (i + 0.5) / self.bins for i in range(self.bins)]
        self.seen = [2.0] * self.bins

    def add(self, confidences: Sequence[float], kept: int) -> None:
        """Of tokens that were verified, of which the first so many were accepted."""
        bins, memory, accepted, seen = self.bins, self.memory, self.accepted, self.seen
        for place, confidence in enumerate(confidences):
            i = min(bins - 1, max(0, int(confidence * bins)))
            accepted[i] = memory * accepted[i] + (place < kept)
            seen[i] = memory * seen[i] + 1

    def probability(self, confidence: float) -> float:
        i = min(self.bins - 1, max(0, int(confidence * self.bins)))
        return self.accepted[i] / self.seen[i]


@dataclass(slots=True)
class Blend:
    """An average over all requests, and one of each: the more a request has shown, the more its own counts."""

    all: Average
    memory: int = 30
    trust: int = 8  # observations after which both count alike
    own: defaultdict[Request, Average] = field(init=False)

    def __post_init__(self) -> None:
        self.own = defaultdict(partial(Average, memory=self.memory))

    def add(self, request: Request, value: float, times: int = 1) -> None:
        self.all.add_same(value, times)
        self.own[request].add_same(value, times)

    def of(self, request: Request) -> float:
        own = self.own.get(request)
        if own is None:
            return self.all.value
        weight = own.count / (own.count + self.trust)
        return weight * own.value + (1 - weight) * self.all.value


@dataclass(slots=True)
class Trials:
    """When a drafter that does not pay is tried again: after a wait that doubles with every trial in vain.

    It grows until trials take at most a share of the time. After one that went well it begins anew.
    """

    share: float = SHARE
    wait: float = 0.0  # seconds
    due: float = 0.0  # in seconds of decoding
    spent: float = 0.0  # seconds, on a trial that goes on

    def paid(self, now: float, step: float) -> None:
        """It is used on its own merits; should that end, the first trial comes soon."""
        self.wait = SOON * step
        self.due = now + self.wait
        self.spent = 0.0

    def again(self, now: float, cost: float) -> None:
        """Its first draft after a rest was right and cost so much: only another one tells what it costs in use."""
        self.due, self.spent = now, self.spent + cost

    def rare(self, step: float) -> bool:
        """Whether trials are so far apart that it hardly matters what one costs."""
        return self.wait > RARE * step

    def made(self, now: float, step: float, cost: float, *, well: bool, reading: float = 0.0) -> None:
        """A trial took so many seconds, and some more to read the text since the last one.

        The longer the wait, the more there is to read: growing by doubling alone, all would be read in the end.
        """
        cost, self.spent = cost + self.spent, 0.0
        least, most = SOON * step, (cost + reading) / self.share
        self.wait = least if well else max(least, reading / self.share / 2, min(2 * self.wait, most))
        self.due = now + self.wait


NOTHING = Line()  # is known of what drafting takes


def margin(count: int) -> float:
    """Tokens a step by which drafts for so many requests together have to beat plain decoding.

    More for several: with drafts their texts end at different times, and a smaller batch is left, which a pass serves
    less well.
    """
    return MARGIN if count == 1 else TOGETHER * count


class Source:
    """One drafter as a policy sees it."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.bins = ConfidenceBins()
        self.alpha = Blend(Average(0.6, count=8, memory=200))  # acceptance of the next token; at first a guess
        self.drafting: dict[int, Line] = {}  # seconds over the tokens of a draft, by the requests that draft together
        self.idle = SOON  # steps since it drafted last
        self.read: dict[Request, int] = {}  # tokens of a text when it drafted for it last
        self.reading = Average()  # seconds that a token takes which it has to read first
        self.read_due = 0.0  # when a text that is too long for that is read again, in seconds of decoding
        self.patience: float = DEAR
        self.trials = Trials()
        self.promised, self.gained = Average(), Average()  # tokens a step
        self.hope = Average(memory=3)  # acceptance in the latest trials
        self.on_trial: Request | None = None  # for whom it is tried
        self.wide = False  # is it time to try it for all?
        self.probing = False  # does this step try what a draft of some length costs?
        self.open: dict[int, int] = {}  # by length: how many drafts of this step go on after so many tokens
        self.kept: dict[int, Average] = {}  # by length: which share of those that came so far did in the latest steps

    # --- what it costs ----------------------------------------------------------------------------------------------

    def unread(self, request: Request) -> int:
        """How many tokens of a text are new to the drafter."""
        return len(request.token_ids) - self.read.get(request, 0)

    def reads(self, request: Request) -> int:
        """`unread`; it reads them now."""
        count = self.unread(request)
        self.read[request] = len(request.token_ids)
        return count

    def entry(self, request: Request, gain: float, rate: float) -> float:
        """Tokens a step that it costs to read the text first, over the steps left if each gains so many."""
        return rate * self._seconds_to_read(request) * (1 + gain) / max(1, request.remaining)

    def _seconds_to_read(self, request: Request) -> float:
        unread = self.unread(request)
        return self.reading.value * unread if unread > MUCH else 0.0

    @property
    def rested(self) -> bool:
        """Whether so many steps went by without it that the processor's caches hold little of it."""
        return self.idle >= SOON

    def too_long(self, request: Request, gain: float, rate: float, now: float) -> bool:
        """Whether it would pay but for what it has to read first.

        Now and then that is read all the same, since only so it is known what it takes: the wait is a multiple of that.
        """
        if not 0 < gain <= self.entry(request, gain, rate):
            return False
        if now < self.read_due:
            return True
        self.read_due = now + self.patience * self._seconds_to_read(request)
        self.patience = min(2 * self.patience, 1 / SHARE)
        return False

    def panel(self, requests: Sequence[Request], costs: BatchCosts) -> Sequence[Request]:
        """For whom of these it is tried: where it is far from paying, for the one of whom least is known.

        That costs a fraction of a trial for all. If it goes so well that it would pay, the next one is for all.
        """
        if self.wide or costs.padded or not self._is_far(len(requests), costs):
            return requests
        if self.on_trial is None or self.on_trial not in requests:
            own = self.alpha.own
            self.on_trial = min(requests, key=lambda request: own[request].count if request in own else 0)
        return [self.on_trial]

    def _is_far(self, count: int, costs: BatchCosts) -> bool:
        """Whether drafts for so many would not pay if half of the refused tokens were right."""
        acceptance = (1 + max(self.hope.value, self.alpha.all.value)) / 2
        gain, _ = self.worth([acceptance] * count, costs, costs.plain_rate)
        return gain <= margin(count)

    def tried(self, acceptance: float, costs: BatchCosts, rate: float, count: int, least: float) -> float:
        """A trial came out so: tokens a step that drafts for so many requests should gain then, 0 if too few.

        If these are enough the next trial is for all of them.
        """
        self.on_trial = None
        self.hope.add(acceptance)
        gain, _ = self.worth([self.hope.value] * count, costs, rate)
        self.wide = gain > least
        return gain if self.wide else 0.0

    def due(self, now: float, step: float) -> float:
        """When it may be tried again; where a text was too long for that, in a few steps: others may be shorter."""
        return self.trials.due if self.trials.due > now else min(self.read_due, now + SOON * step)

    def took(self, length: int, seconds: float, sharing: int, *, unread: Sequence[int] = ()) -> bool:
        """What a draft took, the longest of its step, with so many tokens of each text to read first.

        Returns whether that is typical. After a rest, or with much to read, it says little: it can only lower the
        price.
        """
        much = max(unread, default=0) > MUCH
        typical = not self.rested and not much
        if much and self.drafting:
            self._learn_reading((seconds - self.line(sharing).at(length)) / sum(unread), self.line(sharing).at(1))
        if typical:
            self.drafting.setdefault(sharing, Line(decay=0.97))
        line = self.drafting.get(sharing)
        if line is not None and (typical or seconds < line.at(length)):
            line.add(length, seconds, self.idle)
        self.idle = -1
        return typical

    def _learn_reading(self, seconds: float, most: float) -> None:
        """What a token took: less than one that is drafted alone does. Much less than is known makes that forgotten."""
        seconds = min(max(seconds, 0.0), most)
        if seconds < self.reading.value / 2:
            self.reading, self.patience = Average(), DEAR
        self.reading.add_cost(seconds)

    def line(self, sharing: int) -> Line:
        """Of drafts for so many requests together, or as nearly as known."""
        known = self.drafting.get(sharing)
        if known is None and self.drafting:
            known = self.drafting[min(self.drafting, key=lambda size: abs(size - sharing))]
        return known or NOTHING

    # --- what it brings ---------------------------------------------------------------------------------------------

    def worth(self, alphas: Sequence[float], costs: BatchCosts, rate: float, paid: int = 0) -> tuple[float, int]:
        """Tokens a step that requests with these acceptances gain by drafting together, and how far that is best.

        One pass serves all of them, and so do the rows of a padded batch, of which so many beyond its own are `paid`.
        """
        count = len(alphas)
        rows = rate * costs.row * (costs.batch if costs.padded else count)
        free = max(costs.free_rows, paid + 1 if costs.padded else 0)
        total, most, depth, survivals = 0.0, 0.0, 0, list(alphas)
        line = self.line(count)
        price, more = rate * line.at(1), rate * line.slope  # the first has to begin it, and to read what is new
        for length in range(1, self.maximum + 1):
            gain = sum(survivals) - price - (rows if length >= free else 0.0)
            if gain <= 0 and length > 1:
                break
            total, price = total + gain, more
            if total > most:
                most, depth = total, length
            survivals = [survival * alpha for survival, alpha in zip(survivals, alphas)]  # noqa: B905  # runs often
        return most, depth

    def trust(self) -> float:
        """How much of its promises it kept lately. They leave out that drafts of a batch do not end together."""
        if self.promised.count < SOON or self.promised.value <= 0:
            return 1.0
        return min(2.0, max(0.0, self.gained.value / self.promised.value))

    def survival(self, request: Request, confidences: tuple[float, ...]) -> float:
        """How likely all these tokens and one more are accepted."""
        survival = self.alpha.of(request)
        for confidence in confidences:
            survival *= self.bins.probability(confidence)
        return survival

    def begin(self, limit: int) -> int:
        """Another request of this step drafts, at most so many tokens."""
        self.open[0] = self.open.get(0, 0) + 1
        return limit

    def go_on(self, request: Request, confidences: tuple[float, ...], costs: BatchCosts) -> bool:
        """Whether the next token's expected gain exceeds its price, part of it shared with those likely to draft it."""
        depth = len(confidences)
        shared, own = self._prices(costs, depth + 1)
        going = max(1, self.open.get(depth - 1, 1))  # not all ask at every depth
        go_on = self.survival(request, confidences) > shared[depth] / going + own[depth]
        self.open[depth] = self.open.get(depth, 0) + go_on
        return go_on

    def rule(self, requests: Sequence[Request], costs: BatchCosts, most: int) -> StopRule:
        """`go_on` in numbers."""
        chances = [accepted / seen for accepted, seen in zip(self.bins.accepted, self.bins.seen, strict=True)]
        survivals: list[float | None] = [self.alpha.of(request) for request in requests]
        return StopRule(survivals, chances, *self._prices(costs, most), self.open.get(0, 1))

    def _prices(self, costs: BatchCosts, most: int) -> tuple[list[float], list[float]]:
        """Tokens that one at each depth costs: all that draft it together, and each of them. The first is always made.

        Before anything is known of a drafter it gets no further than a trial would. A rare trial has two tokens
        whatever is known: from drafts of one nobody learns what one more costs.
        """
        sharing, free = max(1, self.open.get(0, 1)), min(costs.free_rows - 1, most)
        own = [0.0] * free + [costs.rate * costs.row] * (most - free)
        shared = [costs.rate * self.line(sharing).slope] * most
        if costs.padded:
            shared, own = [price + costs.batch * row for price, row in zip(shared, own, strict=True)], [0.0] * most
        for depth, kept in self.kept.items() if sharing > 1 else ():
            if depth < most:
                shared[depth] /= 0.75 + 0.25 * kept.value
        if not self.drafting:
            shared[TRIED:] = [math.inf] * (most - TRIED)
        if self.probing:
            shared[:2] = own[:2] = [0.0] * min(2, most)
        return shared, own

    def end_step(self) -> None:
        self.idle += 1
        self.probing = False
        for depth, count in self.open.items():
            before = self.open.get(depth - 1)
            if before:
                self.kept.setdefault(depth, Average(memory=20)).add(count / before)
        self.open = {}

    def learn(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        kept = len(verdict.accepted)
        if kept:
            self.alpha.add(request, 1.0, kept)
        if kept < len(draft):
            self.alpha.add(request, 0.0)
        if draft.confidences:
            self.bins.add(draft.confidences[: kept + 1], kept)

    def forget(self, request: Request) -> None:
        self.alpha.own.pop(request, None)
        self.read.pop(request, None)
        if self.on_trial is request:
            self.on_trial = None
