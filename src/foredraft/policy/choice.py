"""The default policy among several drafters: for each request in each step the one that promises most.

Works with numbers alone. Drafters that look up are asked first and say how sure they are; those that compute are
judged by what they brought before.
"""

from collections.abc import Mapping, Sequence

from foredraft.policy.base import StepTimes, StopRule
from foredraft.policy.candidates import Candidate, Lookup, Round
from foredraft.policy.costs import PLAIN_EVERY, Average, Costs
from foredraft.policy.plan import PLAIN, Offer, Pick, assign, cut
from foredraft.policy.source import MARGIN, SHARE
from foredraft.types import Draft, Request, Verdict

Drafts = Mapping[str, Mapping[Request, Draft]]  # by who looked them up


class Choice:
    """Take the drafter with the highest expected gain: the tokens its draft should bring, less what it costs.

    Costs are the seconds that a step takes longer, times a rate of tokens; drafting nothing costs and gains nothing. A
    drafter that nobody chooses is tried now and then; all trials take about a hundredth of the time.
    """

    def __init__(self, maximum: int = 16, plain_every: int = PLAIN_EVERY) -> None:
        self.num_draft_tokens = maximum
        self.costs = Costs(plain_every=plain_every)
        self.candidates: dict[str, Candidate] = {}
        self.lookups: dict[str, Lookup] = {}
        self.picks: dict[Request, Pick] = {}  # of this step
        self.rests_until = 0.0  # when nobody pays: the next trial, in seconds of decoding
        self.usual = Average(memory=20)  # tokens that the picks of a step should gain

    def know(self, lookups: Sequence[str], candidates: Sequence[str]) -> None:
        """The drafters to choose among, from here on."""
        if [*self.lookups, *self.candidates] == [*lookups, *candidates]:
            return
        most = self.num_draft_tokens
        self.lookups = {name: self.lookups.get(name) or Lookup(most) for name in lookups}
        self.candidates = {name: self.candidates.get(name) or Candidate(most) for name in candidates}
        for source in (*self.lookups.values(), *self.candidates.values()):
            source.trials.share = SHARE / (len(lookups) + len(candidates))

    @property
    def rate(self) -> float:
        """What a second is worth, in tokens, where drafts are weighed against none.

        The rate of plain decoding, but for a part of what the latest steps made more. At their rate drafts gain little,
        by definition, and less by the estimates here, which are careful: drafting ended for some thirty steps, until
        that rate had come down, again and again.
        """
        plain = self.costs.now.plain_rate
        rate: float = plain**0.75 * max(plain, self.costs.now.rate) ** 0.25
        return rate

    # --- how far, as of any policy ----------------------------------------------------------------------------------

    @property
    def rests(self) -> bool:
        return self.costs.elapsed < self.rests_until

    def rested(self, batch: int, seconds: float) -> bool:
        return self.costs.rest(batch, seconds)

    def start(self, request: Request) -> int:
        if self.costs.elapsed < self.rests_until:
            return 0
        self._wake()
        return 0 if self.costs.plain_is_due else self.num_draft_tokens

    def _wake(self) -> None:
        rested = self.costs.wake()
        for source in self.candidates.values() if rested else ():
            source.idle += rested

    def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
        source = self.candidates.get(self.picks.get(request, PLAIN).name or "")
        return source is None or source.go_on(request, confidences, self.costs.now)

    def rule(self, requests: list[Request], most: int) -> StopRule | None:
        names = {self.picks.get(request, PLAIN).name for request in requests}
        source = self.candidates.get(names.pop() or "") if len(names) == 1 else None
        return None if source is None else source.rule(requests, self.costs.now, most)

    def observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        pick = self.picks.pop(request, None)
        if pick is None:
            return
        if pick.name in self.candidates:
            self.candidates[pick.name].learn(request, draft, verdict)
        elif pick.name in self.lookups:
            lookup = self.lookups[pick.name]
            lookup.learn(request, draft, verdict)
            cost = pick.price + self._instead(request) + self.rate * lookup.asking.value
            lookup.gains.add(request, len(verdict.accepted) - cost)

    def _instead(self, request: Request) -> float:
        """What this request would have gained by the best drafter that computes."""
        gains = [0.0]
        for name, source in self.candidates.items():
            if request.drafter in (None, name):
                alphas = [source.alpha.of(request)] * self.costs.batch
                gain, _ = source.worth(alphas, self.costs.now, self.rate)
                gains.append(gain * source.trust() / self.costs.batch)
        return max(gains)

    def observe_times(self, times: StepTimes) -> None:
        if times.read:
            return
        self._wake()
        rounds = [source.round for source in self.candidates.values() if source.round is not None]
        self.costs.add(times, wide=all(done.wide for done in rounds))
        for source in self.candidates.values():
            source.end_step(times)

    def forget(self, request: Request) -> None:
        self.picks.pop(request, None)
        for source in (*self.candidates.values(), *self.lookups.values()):
            source.forget(request)

    # --- who --------------------------------------------------------------------------------------------------------

    def asks(self, name: str, requests: Sequence[Request]) -> list[Request]:
        """For which of these requests it is worth looking something up."""
        return self.lookups[name].asks(requests, self.costs)

    def choose(self, requests: Sequence[Request], drafts: Drafts) -> dict[Request, Pick]:
        """Who drafts for each request in this step, given what was looked up; those missing are decoded plainly."""
        rate, now = self.rate, self.costs.now
        for source in self.candidates.values():
            source.settle(self.costs, rate)
        offers = self._offers(drafts)
        self.picks = assign(requests, cut(offers, now, rate), self.candidates, now, rate)
        self._try_others(requests)
        self._oblige([request for request in requests if request.num_draft_tokens is not None], offers)
        self._begin()
        for name, asked in drafts.items():
            picks = {request: self.picks.get(request, PLAIN) for request in asked}
            gains = {request: pick.gain if pick.name == name else 0.0 for request, pick in picks.items()}
            self.lookups[name].charge(gains, self.costs, rate)
        sources = (*self.candidates.values(), *self.lookups.values())
        paying = self.picks or any(lookup.pays for lookup in self.lookups.values())
        elapsed, step = self.costs.elapsed, now.plain.value
        self.rests_until = 0.0 if paying else min(source.due(elapsed, step) for source in sources)
        return self.picks

    def _begin(self) -> None:
        for name, source in self.candidates.items():
            group = [request for request, pick in self.picks.items() if pick.name == name]
            if group and source.round is None and all(request.num_draft_tokens is None for request in group):
                now = self.costs.now
                gain, _ = source.worth([source.alpha.of(request) for request in group], now, now.plain_rate)
                source.round = Round(frozenset(group), gain)
            source.open = {0: len(group)}

    def _offers(self, drafts: Drafts) -> dict[Request, Offer]:
        """The best that was looked up for each."""
        offers: dict[Request, Offer] = {}
        for name, found in drafts.items():
            for request, draft in found.items():
                offer = self.lookups[name].offer(name, request, draft)
                known = offers.get(request)
                if known is None or sum(offer.survivals) > sum(known.survivals):
                    offers[request] = offer
        return offers

    def _oblige(self, requests: Sequence[Request], offers: Mapping[Request, Offer]) -> None:
        """These asked for a length of their own: whoever is best drafts, whether that pays or not."""
        for request in requests:
            offer, names = offers.get(request), [n for n in self.candidates if request.drafter in (None, n)]
            if self.picks.get(request, PLAIN).name not in names:
                if offer is not None and offer.survivals:
                    self.picks[request] = Pick(offer.name, length=len(offer.survivals))
                elif names:
                    self.picks[request] = Pick(max(names, key=lambda name: self.candidates[name].alpha.of(request)))

    def _try_others(self, requests: Sequence[Request]) -> None:
        """Let one drafter whose trial is due draft for all who did not choose it, in a step that promises little."""
        elapsed, step = self.costs.elapsed, self.costs.now.plain.value
        gain = sum(pick.gain for pick in self.picks.values())
        self.usual.add(gain)
        tried = gain > self.usual.value + MARGIN
        for name, source in self.candidates.items():
            free = [r for r in requests if r.num_draft_tokens is None and r.drafter in (None, name)]
            others = [request for request in free if self.picks.get(request, PLAIN).name != name]
            if not others:
                source.trials.paid(elapsed, step)
            elif elapsed >= source.trials.due and not tried:
                others = [request for request in others if not self._too_long(source, request)]
                if not others:
                    continue
                panel = source.panel(others, self.costs.now)
                displaced, instead = (sum(self.picks.get(r, PLAIN).gain for r in group) for group in (panel, others))
                source.round = Round(frozenset(panel), 0.0, True, displaced, len(others), instead)
                self.picks.update(dict.fromkeys(panel, Pick(name)))
                tried = True

    def _too_long(self, source: Candidate, request: Request) -> bool:
        gain, _ = source.worth([source.alpha.of(request)] * self.costs.batch, self.costs.now, self.rate)
        return source.too_long(request, gain / self.costs.batch, self.rate, self.costs.elapsed)

    def took(self, name: str, seconds: float, requests: Sequence[Request], longest: int) -> None:
        """What it took a drafter to draft for these requests, the longest so many tokens."""
        if name in self.lookups:
            self.lookups[name].asking.add_cost(seconds / len(requests))
            return
        self.candidates[name].drafted(seconds, requests, longest)
