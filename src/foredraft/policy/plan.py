"""Who drafts for whom in one step: offers that are on the table, against drafters that would have to compute.

Pure functions of expectations and prices. What a pass costs is paid once by all who share it, and in a padded batch so
are the rows, so the requests of a step are considered together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from foredraft.policy.costs import BatchCosts
from foredraft.policy.source import Source, margin
from foredraft.types import Request


@dataclass(frozen=True, slots=True)
class Offer:
    """A draft that was looked up: how likely it is right up to each of its tokens, forced ones left out."""

    name: str
    survivals: Sequence[float]


@dataclass(frozen=True, slots=True)
class Pick:
    """Who drafts for a request in this step, and the tokens a step that it should gain."""

    name: str | None = None  # None: nobody
    gain: float = 0.0
    length: int = 0  # of an offer: how much of it to verify
    price: float = 0.0  # of an offer: what verifying that much costs, in tokens


PLAIN = Pick()


def cut(offers: Mapping[Request, Offer], costs: BatchCosts, rate: float) -> dict[Request, Pick]:
    """As much of each offer as pays. In a padded batch all draw on the rows of the longest, and share their price."""
    shares = _shares([offer.survivals for offer in offers.values()], costs, rate)
    picks = {}
    for request, offer in offers.items():
        brings = price = 0.0
        length = 0
        for survival in offer.survivals[: len(shares) if costs.padded else None]:
            own = survival * shares[length] if costs.padded else rate * costs.row_price(length, 1)
            if survival <= own:
                break
            brings, price, length = brings + survival, price + own, length + 1
        if length:
            picks[request] = Pick(offer.name, brings - price, length, price)
    return picks


def _shares(survivals: list[Sequence[float]], costs: BatchCosts, rate: float) -> list[float]:
    """By depth, as far as that pays: the price of a padded batch's rows over what they should bring."""
    shares: list[float] = []
    while costs.padded:
        depth = len(shares)
        total = sum(own[depth] for own in survivals if len(own) > depth)
        price = rate * costs.row_price(depth, 1)
        if total <= price:
            break
        shares.append(price / total)
    return shares


def assign(
    requests: Sequence[Request],
    offered: Mapping[Request, Pick],
    sources: Mapping[str, Source],
    costs: BatchCosts,
    rate: float,
) -> dict[Request, Pick]:
    """The division of the requests among offers and drafters that is expected to gain most, over all of them.

    A drafter that computes is used by nobody, or by all for whom it promises more than they have otherwise. At the
    latest rate of tokens the best one gains most, but over what it does itself hardly anything: whether it gains enough
    is told by `rate`.
    """
    latest = max(rate, costs.rate)
    looked_up = sum(pick.gain for pick in offered.values())
    best, most = dict(offered), (0.0, looked_up + margin(len(requests)))
    promised = {name: _promises(name, source, requests, costs, rate) for name, source in sources.items()}
    for names in _subsets([name for name, promises in promised.items() if promises], len(requests)):
        picks = dict(offered)
        for name in names:
            for request, pick in promised[name].items():
                if pick.gain > picks.get(request, PLAIN).gain:
                    picks[request] = pick
        users = {name: sources[name] for name in names}
        total = _total(picks, users, costs, rate)
        if total > looked_up + margin(len(requests)):
            found = _total(picks, users, costs, latest), total
            if found > most:
                best, most = picks, found
    return best


def _subsets(names: list[str], most: int) -> Iterator[tuple[str, ...]]:
    for size in range(1, min(len(names), most) + 1):
        yield from combinations(names, size)


def _promises(
    name: str, source: Source, requests: Sequence[Request], costs: BatchCosts, rate: float
) -> dict[Request, Pick]:
    """What each request would gain by joining in passes that are made anyway."""
    alphas = {r: source.alpha.of(r) for r in requests if r.drafter in (None, name)}
    _, depth = source.worth(list(alphas.values()), costs, rate)
    row = 0.0 if costs.padded else rate * costs.row
    gains = {request: _geometric(alpha, depth) - row * depth for request, alpha in alphas.items() if depth}
    return {request: Pick(name, gain - source.entry(request, gain, rate)) for request, gain in gains.items()}


def _geometric(ratio: float, count: int) -> float:
    """ratio + ratio^2 + ... + ratio^count"""
    return count * ratio if ratio == 1 else ratio * (1 - ratio**count) / (1 - ratio)


def _total(picks: Mapping[Request, Pick], sources: Mapping[str, Source], costs: BatchCosts, rate: float) -> float:
    total, paid = 0.0, 0
    groups: dict[str, list[Request]] = {name: [] for name in sources}
    for request, pick in picks.items():
        if pick.name in groups:
            groups[pick.name].append(request)
        else:
            total, paid = total + pick.gain, max(paid, pick.length)
    for name, group in groups.items():
        if group:
            source = sources[name]
            gain, _ = source.worth([source.alpha.of(request) for request in group], costs, rate, paid)
            entries = [source.entry(request, gain / len(group), rate) for request in group]
            total += gain * source.trust() - sum(entries)
    return total
