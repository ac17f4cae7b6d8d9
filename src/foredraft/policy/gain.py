"""The default policy: draft one more token while what it is expected to bring exceeds what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from foredraft.policy.base import StepTimes, StopRule
from foredraft.policy.costs import PLAIN_EVERY, Average, Costs
from foredraft.policy.source import MARGIN, TRIED, Blend, Source, margin
from foredraft.types import Draft, Request, Verdict

ENOUGH = 16  # steps that tell whether drafting gains anything
MOST_REST = 8  # steps, at batch 1, where it all but pays
PATIENCE = 8  # times that drafting is found not to pay, before such a rest is a step longer
LONG_REST = 64  # steps, where it would not pay
HOPEFUL = 0.8  # if a second were worth so much of what it is


@dataclass(slots=True)
class Step:
    """What the requests have decided so far in this step."""

    asked: list[Request] = field(default_factory=list)
    gain: float | None = None  # of each by drafting together, as in the step before; None: not worked out yet
    drafting: set[Request] = field(default_factory=set)  # for whom a draft is asked
    longest: int = 0
    trying: set[Request] = field(default_factory=set)
    right: int = 0
    made: int = 0
    unread: list[int] = field(default_factory=list)  # tokens that the drafter has to read first, of each of these


class Gain:
    """Draft one more token while its expected gain exceeds its measured price; the default, for one drafter.

    The price of a drafted token is what it adds to a step in seconds, at the current rate of tokens; its gain is the
    probability that it and all before it are accepted, from calibrated confidences. If no length gains anything over
    plain decoding, nothing is drafted except a few tokens now and then, by all requests at once, so that drafting can
    come back. The same where a drafter hardly ever has a draft (one that looks up, in a text that does not repeat) and
    asking it costs more than it brings. A plain step now and then keeps the price of plain decoding up to date.
    """

    def __init__(self, maximum: int = 16, plain_every: int = PLAIN_EVERY) -> None:
        self.num_draft_tokens = maximum
        self.source = Source(maximum)
        self.found = Blend(Average(1.0, count=8, memory=200), memory=100, trust=50)  # how often a draft comes of asking
        self.asking = Average()  # seconds that it takes to be told, for each request, that there is none
        self.costs = Costs(plain_every=plain_every)
        self.step = Step()
        self.group: list[Request] = []  # of the step before
        self.rests_until = 0.0  # where nothing paid: when that is worked out again, in seconds of decoding
        self.fruitless = 0  # times that it was worked out since a draft paid

    @property
    def rests(self) -> bool:
        return self.costs.elapsed < self.rests_until

    def rested(self, batch: int, seconds: float) -> bool:
        return self.costs.rest(batch, seconds)

    def start(self, request: Request) -> int:
        costs = self.costs
        if costs.elapsed < self.rests_until:
            return 0
        self._wake()
        if costs.plain_is_due:
            return 0
        self.step.asked.append(request)
        gain = self._gains(request)
        if self.source.too_long(request, gain, costs.now.plain_rate, costs.elapsed):
            return 0
        if gain > 0:
            self.fruitless = 0
            return self._begin(request, self.num_draft_tokens)
        if costs.elapsed < self.source.trials.due or not self._tries(request):
            return 0
        self.step.trying.add(request)
        self.source.probing |= self.source.trials.rare(costs.now.plain.value)
        return self._begin(request, TRIED)

    def _tries(self, request: Request) -> bool:
        group = self.group if request in self.group else [*self.group, request]
        return request in self.source.panel(group, self.costs.now)

    def _wake(self) -> None:
        self.source.idle += self.costs.wake()

    def _begin(self, request: Request, most: int) -> int:
        self.step.drafting.add(request)
        self.step.unread.append(self.source.reads(request))
        return self.source.begin(most)

    def _gains(self, request: Request) -> float:
        """Tokens that this request gains where it and those of the step before draft together; 0: it does not pay.

        Less what the times cost that it is asked and there is no draft.
        """
        alpha, found, now = self.source.alpha.of(request), self.found.of(request), self.costs.now
        gain = found * self._gain_of(request) - (1 - found) * now.plain_rate * self.asking.value
        return gain if alpha > now.rate * now.row_price(0, now.batch) else 0.0

    def _gain_of(self, request: Request) -> float:
        """Tokens that each gains where this request and those of the step before draft together; 0: it does not pay."""
        if request not in self.group:
            return self._gain([request, *self.group])
        if self.step.gain is None:
            self.step.gain = self._gain(self.group)
        return self.step.gain

    def _gain(self, group: Sequence[Request]) -> float:
        return self._expected([self.source.alpha.of(request) for request in group]) / len(group)

    def _expected(self, alphas: Sequence[float]) -> float:
        """Tokens that requests with these acceptances should gain by drafting together; 0 where it does not pay.

        Nor where steps with drafts were slower than plain ones, whatever is expected of them.
        """
        now = self.costs.now
        expected, _ = self.source.worth(alphas, now, now.plain_rate)
        return expected if expected > margin(len(alphas)) and not self._disappoints(len(alphas)) else 0.0

    def _disappoints(self, batch: int) -> bool:
        """Whether steps with drafts for so many were slower than plain ones."""
        costs = self.costs.by_batch.get(batch)
        return costs is not None and costs.gained.count >= ENOUGH and costs.gained.value <= -MARGIN * batch

    def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
        return self.source.go_on(request, confidences, self.costs.now)

    def rule(self, requests: list[Request], most: int) -> StopRule | None:
        if type(self).go_on is not Gain.go_on:
            return None
        return self.source.rule(requests, self.costs.now, most)

    def observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        self.source.learn(request, draft, verdict)
        if request in self.step.drafting and request.draft_limit and not request.lead:
            self.found.add(request, float(len(draft) > 0))
        self.step.longest = max(self.step.longest, len(draft))
        if draft.tokens and request in self.step.trying:
            self.step.made += 1
            self.step.right += bool(verdict.accepted)

    def observe_times(self, times: StepTimes) -> None:
        if times.read:  # what such a step took tells nothing of decoding
            self.step = Step()
            self.source.end_step()
            return
        if times.batch != self.costs.batch:
            self.rests_until = 0.0
        self._wake()
        wide = not 0 < len(self.step.trying) < times.batch
        self.costs.add(times, wide=wide)
        if self.costs.elapsed < self.rests_until:
            self.source.end_step()
            return
        step, self.step = self.step, Step()
        first = self.source.rested
        sharing = len(step.drafting)
        if step.longest and self.source.took(step.longest, times.drafting, sharing, unread=step.unread) and wide:
            seconds = self._believed(step.longest, sharing, times)
            self.costs.now.gained.add(times.emitted - self.costs.now.plain_rate * seconds)
        if step.drafting and not step.longest:
            self.asking.add_cost(times.drafting / len(step.drafting))
        self.source.end_step()
        if step.asked:
            self.group = step.asked
        self._plan_trials(step, times, first)
        if step.asked and not step.drafting:
            self._rest(times.batch)

    def _believed(self, longest: int, sharing: int, times: StepTimes) -> float:
        """Seconds of a step; one far longer than it should be was held up by something else that ran."""
        now = self.costs.now
        expected = now.plain.value + self.source.line(sharing).at(longest) + now.row * (times.rows - now.plain_rows)
        return min(times.total, 2 * expected) if now.plain.count else times.total

    def _rest(self, batch: int) -> None:
        """Nothing pays: to work that out takes each request a while, so it stands for some steps.

        As many as there are other requests, or more the more often it came out so; few where it all but pays, since
        then it soon may: while nobody drafts nothing else changes than what plain steps take.
        """
        costs = self.costs
        self.fruitless += 1
        longer = min(self.fruitless // PATIENCE, MOST_REST) if self._nearly() else min(self.fruitless, LONG_REST)
        steps = max(batch - 1, longer)
        due = self.source.due(costs.elapsed, costs.now.plain.value)
        self.rests_until = min(due, costs.elapsed + steps * costs.now.plain.value)

    def _nearly(self) -> bool:
        """Whether drafting would pay for some request if its time were worth less."""
        now, source = self.costs.now, self.source
        rate = HOPEFUL * now.plain_rate
        gain, _ = source.worth([source.alpha.of(request) for request in self.group], now, rate)
        found = max(self.found.of(request) for request in self.group)
        return found * gain / len(self.group) > (1 - found) * rate * self.asking.value

    def _plan_trials(self, step: Step, times: StepTimes, first: bool) -> None:
        now, elapsed, trials = self.costs.now, self.costs.elapsed, self.source.trials
        if step.trying:
            rows = (times.batch if now.padded else times.drafted) * now.row_price(0, times.batch)
            cost = times.drafting + (rows + now.thaws if step.longest else 0.0)
            if first and step.right:
                trials.again(elapsed, cost)
            else:
                trials.made(elapsed, now.plain.value, cost, well=self._went_well(step, times.batch))
        elif step.longest:
            trials.paid(elapsed, now.plain.value)

    def _went_well(self, step: Step, batch: int) -> bool:
        """Whether drafts as good as those of the latest trials would pay; that they were right is not enough."""
        now, all_tried = self.costs.now, len(step.trying) == batch
        acceptance = step.right / step.made if step.made else 0.0
        gain = self.source.tried(acceptance, now, now.plain_rate, batch, margin(batch))
        return gain > 0 and not (all_tried and self._disappoints(batch))

    def forget(self, request: Request) -> None:
        self.source.forget(request)
        self.found.own.pop(request, None)
        if request in self.group:
            self.group.remove(request)
