"""From scores to tokens: the target's choice, a drafter's guess, log-probabilities; the same code for both models.

A row's token does not depend on what other rows are in the call. Knows nothing of models, caches or how drafts are
checked.
"""

import math
from collections import abc
from typing import NamedTuple

import torch

from foredraft import noise
from foredraft.errors import MaskedError, NumericsError
from foredraft.native import choosing
from foredraft.native.choosing import Follower, Place, Sampler
from foredraft.native.library import loaded
from foredraft.noise import Stream
from foredraft.scores import Ids, adjust, candidates, filters, probabilities, restrict
from foredraft.types import Request, SamplingParams, TokenLogprobs, VerifierName


def choose(
    scores: torch.Tensor,
    params: SamplingParams,
    seeds: int | Ids,
    positions: Ids,
    stream: int = Stream.TOKEN,
) -> list[int]:
    """The token of each row of `adjust`'s scores, after the filters. # [n, V] -> n

    argmax(p / E), E exponential noise keyed by (seed, position, token): that is argmax(log p + Gumbel noise), a draw
    from p (the Gumbel-max trick). Its limit at temperature 0 is the argmax, the lowest id among equals.
    `positions[i]` is the absolute index of the token that row i decides.

    Raises:
        NumericsError: a row has NaN or +inf, or nothing but -inf.
    """
    if params.greedy:
        tokens, peaks = best(scores)
        check_finite(peaks, positions)
        return tokens
    if choosing.serves(scores):
        one = isinstance(seeds, int)
        place = Place([seeds] * len(scores) if one else seeds, positions, stream)  # type: ignore[arg-type, list-item]
        tokens, peaks, _ = choosing.choose(scores, sampler(params)._replace(temperature=1.0), place)
        check_finite(peaks, positions)
        return tokens
    weights, ids, peak = _entrants(scores, params)
    check_finite(peak.flatten().tolist(), positions)
    winners = race(weights, seeds, positions, stream, ids).unsqueeze(1)
    return list(map(int, (winners if ids is None else ids.gather(1, winners)).flatten().tolist()))


def sampler(params: SamplingParams) -> Sampler:
    return Sampler(params.temperature, params.top_k, params.top_p, params.min_p)


def follow(logits: torch.Tensor, tokens: Ids, request: Request) -> list[int] | None:
    """What `choose` makes of each row along a draft, up to the first token that the draft has not. # [n + 1, V], n

    From raw logits, in the library; None where that is not there, or more than a constraint changes the scores.

    Raises:
        NumericsError: a row that was reached has NaN or +inf, or nothing but -inf.
        GrammarError: the constraint of a row that was reached has failed.
    """
    follower = request.follower or _follower(request)
    if follower is None or not choosing.serves(logits):
        return None
    constraint, start = request.steering.constraint, len(request.token_ids)
    if constraint is None:
        targets = follower(logits, request.seed, start, tokens)
        _check_last(follower, start + len(targets))
        return targets
    targets = []
    for row, position in enumerate(range(start, start + len(tokens) + 1)):
        (allowed,) = constraint.allowed_after((tokens[:row],))
        targets += follower(logits[row : row + 1] if tokens else logits, request.seed, position, (), allowed)
        _check_last(follower, position + 1)
        if row < len(tokens) and targets[row] != tokens[row]:
            break
    return targets


def _follower(request: Request) -> Follower | None:
    """What draws a request's tokens in the library; None where it cannot."""
    if loaded() is not None and request.params.only_draws:
        request.follower = Follower(sampler(request.params), Stream.TOKEN)
    return request.follower


def _check_last(follower: Follower, end: int) -> None:
    """`check_finite` for what was drawn last, the tokens up to position `end`."""
    if not math.isfinite(follower.peak[0]):
        check_finite(follower.peak, [end - 1])


def _entrants(scores: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Weights to draw by, the token ids of their columns (None: all), each row's peak. # [n, k], [n, k], [n, 1]"""
    peak = scores.amax(-1, keepdim=True)
    if not filters(params):
        return (scores - peak).exp_(), None, peak
    values, ids = candidates(scores, params)
    ids, order = ids.sort(-1)  # the lowest id wins a tie, as without filters
    return (values.gather(1, order) - peak).exp_(), ids, peak


def race(
    weights: torch.Tensor, seeds: int | Ids, positions: Ids, stream: int, ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Draw a column of each row in proportion to its weights: argmax(weights / E). # [n, k] float32 -> [n] int64

    `ids` are the columns' token ids, by default 0 to k - 1.
    """
    tokens = weights.shape[1] if ids is None else ids
    finish = weights / noise.exponential(seeds, positions, tokens, stream, weights.device)
    return torch.from_numpy(finish.numpy().argmax(-1)) if finish.device.type == "cpu" else finish.argmax(-1)


def best(scores: torch.Tensor) -> tuple[list[int], list[float]]:
    """Each row's argmax, the lowest id among equals, and its score; NaN is above all. # [n, V] -> n, n

    Numpy's argmax is five times as fast as torch's on a CPU (5 rows of 32,000: 17 against 85 us).
    """
    if scores.device.type == "cpu":
        rows = scores.numpy()
        tokens = rows.argmax(-1).tolist()
        return tokens, list(map(rows.item, range(len(rows)), tokens))
    values, found = scores.max(-1)
    ids, peaks = _to_host(found, values)
    return list(map(int, ids)), peaks


def check_finite(peaks: abc.Iterable[float], positions: Ids) -> None:
    """Refuse rows with NaN or +inf in them, which a maximum keeps, and rows where every score is -inf.

    Raises:
        NumericsError: with the first such row.
    """
    for peak, position in zip(peaks, positions, strict=True):
        if not math.isfinite(peak):
            cause = "every token is masked" if peak < 0 else "the model overflowed, or a processor divided by zero"
            advice = "relax logit_bias, processors or the form" if peak < 0 else "load it in bfloat16 or float32"
            kind = MaskedError if peak == -math.inf else NumericsError
            raise kind(f"the largest score at position {position} is {peak}: {cause}; {advice}")


class Drawn(NamedTuple):
    """A drafter's guess. `confidence` is its own probability of `token`, `probs` what the token was drawn from.

    A NaN confidence means that the logits were NaN or infinite; `token` then means nothing.
    """

    token: int
    confidence: float
    probs: torch.Tensor | None = None  # [V] float32; None: nothing a verifier needs (greedy, coupled)


def is_plain(request: Request) -> bool:
    """Whether its tokens are drawn by temperature, filters and noise alone: nothing else processes their scores."""
    return request.params.only_draws and not request.steering.active


def draw(
    logits: torch.Tensor,
    requests: abc.Sequence[Request],
    drafted: abc.Sequence[Ids],
    *,
    argmax: abc.Collection[VerifierName] = (),
) -> list[Drawn | None]:
    """One guess for each request after its committed and its drafted tokens. # [b, V] -> b

    The target's own processing, and for `coupled` the target's own noise, so that both tend to choose alike; for
    `rejection` a draw from q with noise of its own, new in every block (keyed by where the block starts).
    For the verifiers in `argmax` the likeliest token: a one-hot q, for a drafter that cannot hand over another.
    None where the request's own processor fails on this prefix, which is an error only if the text ever gets there.
    """
    groups = _alike(requests)
    if len(groups) == 1:
        return _draw_alike(logits, requests, drafted, argmax)
    guesses: list[Drawn | None] = [None] * len(requests)
    for rows in groups:
        own = _draw_alike(logits[rows], [requests[row] for row in rows], [drafted[row] for row in rows], argmax)
        for row, guess in zip(rows, own, strict=True):
            guesses[row] = guess
    return guesses


def _alike(requests: abc.Sequence[Request]) -> list[list[int]]:
    """Groups of rows that one call can process: equal settings, and scores that do not depend on the prefix."""
    if len(requests) == 1:
        return [[0]]
    groups: dict[object, list[int]] = {}
    for row, request in enumerate(requests):
        params = request.params
        alone = bool(params.logit_bias) or params.penalises or request.steering.active
        settings = (params.temperature, params.top_k, params.top_p, params.min_p, params.verifier)
        groups.setdefault(row if alone else settings, []).append(row)
    return list(groups.values())


def _draw_alike(
    logits: torch.Tensor,
    requests: abc.Sequence[Request],
    drafted: abc.Sequence[Ids],
    argmax: abc.Collection[VerifierName],
) -> list[Drawn | None]:
    """`draw` for requests that one call can process, with one transfer to the host. # [b, V] -> b"""
    first, params = requests[0], requests[0].params
    try:
        scores = adjust(logits, first.token_ids, drafted, first.prompt_len, params, first.steering)
    except Exception:
        if not first.steering.active:
            raise
        return [None]
    if params.greedy or params.verifier in argmax:  # any of several equals will do: it is a guess
        return [Drawn(token, chance) for token, chance in zip(*best(probabilities(scores)), strict=True)]
    starts = [len(request.token_ids) for request in requests]
    positions = [start + len(path) for start, path in zip(starts, drafted, strict=True)]
    rows: abc.Sequence[torch.Tensor | None] = [None] * len(requests)
    if params.verifier == "coupled" and choosing.serves(scores):
        place = Place([s.seed for s in requests], positions, Stream.TOKEN)
        found, _, sure = choosing.choose(scores, sampler(params)._replace(temperature=1.0), place)
        return list(map(Drawn, found, sure))
    if params.verifier == "coupled":
        weights, ids, _ = _entrants(scores, params)
        columns = race(weights, [s.seed for s in requests], positions, Stream.TOKEN, ids).unsqueeze(1)
        chances = weights.gather(1, columns).squeeze(1) / weights.sum(-1)
        tokens = columns if ids is None else ids.gather(1, columns)
    else:
        seeds = [noise.fold(s.seed, start) for s, start in zip(requests, starts, strict=True)]
        probs = probabilities(restrict(scores, params))
        tokens = race(probs, seeds, positions, Stream.DRAFT).unsqueeze(1)
        chances = probs.gather(1, tokens).squeeze(1)
        rows = probs.unbind()
    drawn = zip(*_to_host(tokens.squeeze(1), chances), rows, strict=True)
    return [Drawn(int(token), chance, row) for token, chance, row in drawn]


def _to_host(*columns: torch.Tensor) -> list[list[float]]:
    """Columns [b] as lists, with one wait for the device."""
    if columns[0].device.type == "cpu":
        return [column.tolist() for column in columns]
    together: list[list[float]] = torch.stack([column.double() for column in columns]).tolist()
    return together


def logprobs(logits: torch.Tensor, tokens: Ids, top: int) -> list[TokenLogprobs]:
    """Log-probabilities of `tokens`, and of the `top` likeliest, before any processing. # [n, V] -> n"""
    logs = logits.float().log_softmax(-1)
    chosen = logs.gather(1, torch.tensor(tokens, device=logs.device).unsqueeze(1)).flatten().tolist()
    values, ids = logs.topk(min(top, logs.shape[1]))
    pairs = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprobs(*found) for found in zip(tokens, chosen, pairs, strict=True)]
