"""From logits and a true prefix to processed scores, and from scores to tokens; the same code for target and drafters.

A row's result has the same bits whatever other rows are in the call: every step is elementwise or compares a row with
its own maximum and order; the one sum that decides anything (top_p) is taken in float64. Knows nothing of models,
caches or how drafts are checked.

Order, as in vLLM and transformers: logit_bias, penalties, custom processors, temperature, top_k, top_p, min_p.
"""

import math
from collections import abc
from typing import NamedTuple

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from foredraft import noise
from foredraft.errors import NumericsError, RequestError
from foredraft.noise import Stream
from foredraft.steering import Steering
from foredraft.types import Request, SamplingParams, TokenLogprobs, VerifierName

Ids = abc.Sequence[int]
_CANDIDATES = 64  # how many of the likeliest tokens a filter looks at first; a full sort is 50 times dearer


def process(
    logits: torch.Tensor, prefix: Ids, paths: abc.Sequence[Ids], prompt_len: int, params: SamplingParams
) -> torch.Tensor:
    """Scores after everything the request asks for, filters too (-inf: filtered out). # [n, V] -> [n, V] float32

    Arguments and errors as for `adjust`.
    """
    return restrict(adjust(logits, prefix, paths, prompt_len, params), params)


def adjust(
    logits: torch.Tensor,
    prefix: Ids,
    paths: abc.Sequence[Ids],
    prompt_len: int,
    params: SamplingParams,
    steering: Steering | None = None,
) -> torch.Tensor:
    """Scores after bias, penalties, custom processors and temperature. # [n, V] of any dtype -> [n, V] float32

    Row i decides the token after `prefix + paths[i]`, whose first `prompt_len` tokens are the prompt; prefix and paths
    are not looked at unless the request has penalties or processors. `steering` is the request's; None takes the
    processors as they are in `params`. `logits` are never written to, and may be what is returned.

    Raises:
        RequestError: `logit_bias` names a token outside the vocabulary, or a custom processor changed the shape.
    """
    scores = logits.float()
    if params.logit_bias:
        scores = _bias(scores, params.logit_bias)
    if _penalises(params):
        scores = _penalise(scores, prefix, paths, prompt_len, params)
    steering = Steering(params.processors) if steering is None else steering
    if steering.active:
        scores = steering.apply(scores, prefix, paths)
    return scores if params.temperature in (0, 1) else scores / params.temperature


def _penalises(params: SamplingParams) -> bool:
    """Whether the scores of a position depend on the tokens before it."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _bias(scores: torch.Tensor, logit_bias: abc.Mapping[int, float]) -> torch.Tensor:
    """# [n, V] -> [n, V]"""
    outside = [token for token in logit_bias if not 0 <= token < scores.shape[1]]
    if outside:
        raise RequestError(f"logit_bias names tokens {outside}; this vocabulary has ids 0 to {scores.shape[1] - 1}")
    tokens = torch.tensor(list(logit_bias), device=scores.device)
    biases = torch.tensor(list(logit_bias.values()), dtype=torch.float32, device=scores.device)
    return scores.index_add(1, tokens, biases.expand(len(scores), -1))


def _penalise(
    scores: torch.Tensor, prefix: Ids, paths: abc.Sequence[Ids], prompt_len: int, params: SamplingParams
) -> torch.Tensor:
    """Repetition (prompt and output), then presence and frequency (output alone), each row by its own prefix."""
    if params.repetition_penalty != 1:
        longest = max(map(len, paths))
        padded = [[*path, *[prefix[-1]] * (longest - len(path))] for path in paths]  # penalised already: no change
        shared = torch.tensor(prefix, device=scores.device).expand(len(paths), -1)
        own = torch.tensor(padded, dtype=torch.int64, device=scores.device)
        ids = torch.cat((shared, own), dim=1)
        penalty = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
        scores = penalty(ids, scores)
    if params.presence_penalty or params.frequency_penalty:
        counts = _output_counts(scores, prefix[prompt_len:], paths)
        scores = scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    return scores


def _output_counts(scores: torch.Tensor, output: Ids, paths: abc.Sequence[Ids]) -> torch.Tensor:
    """How often each token is in the output before each row. # [n, V] float32"""
    shared = torch.tensor(output, dtype=torch.int64, device=scores.device).bincount(minlength=scores.shape[1])
    rows = [row for row, path in enumerate(paths) for _ in path]
    tokens = [token for path in paths for token in path]
    where = torch.tensor([rows, tokens], dtype=torch.int64, device=scores.device)
    counts = shared.to(scores.dtype).repeat(len(paths), 1)
    return counts.index_put_((where[0], where[1]), scores.new_ones(()), accumulate=True)


def restrict(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """`adjust`'s scores with what top_k, top_p and min_p take out set to -inf. # [n, V]"""
    if not _filters(params):
        return scores
    values, ids = _candidates(scores, params)
    return torch.full_like(scores, -math.inf).scatter_(1, ids, values)


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _candidates(scores: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and ids of a set that holds every token the filters keep; -inf for others. # 2 x [n, width]

    The sets of transformers' TopK-, TopP- and MinPLogitsWarper in this order (its top_p cuts ties at random, here all
    that tie with the last one kept are kept), without sorting the vocabulary: looks at the likeliest tokens only, at 8
    times as many when some row keeps them all.
    """
    peak = scores.amax(-1, keepdim=True)
    total = (scores - peak).exp_().sum(-1, keepdim=True, dtype=torch.float64) if params.top_k == 0 else None
    width = max(_CANDIDATES, params.top_k + 1)
    while True:
        values, ids = scores.topk(min(width, scores.shape[1]))
        floor = _floor(values, peak, total, params)
        last = values[:, -1:]
        if width >= scores.shape[1] or bool(((last < floor) | (last == -math.inf)).all()):
            return values.masked_fill(values < floor, -math.inf), ids
        width *= 8


def _floor(
    values: torch.Tensor, peak: torch.Tensor, total: torch.Tensor | None, params: SamplingParams
) -> torch.Tensor:
    """The lowest score that the filters keep. # values [n, width] in descending order -> [n, 1]

    `total` is the row's sum of exp(score - peak); without it the sum is over what top_k keeps.
    """
    floor = torch.full_like(peak, -math.inf)
    if params.top_k:
        floor = values[:, min(params.top_k, values.shape[1]) - 1, None]
    if params.top_p < 1:
        weights = (values - peak).exp_().masked_fill_(values < floor, 0)
        mass = weights.cumsum(-1, dtype=torch.float64)
        wanted = params.top_p * (mass[:, -1:] if total is None else total)
        kept = (mass < wanted).sum(-1, keepdim=True).clamp_(max=values.shape[1] - 1)  # index of the last one kept
        floor = torch.maximum(floor, values.gather(1, kept))
    if params.min_p > 0:
        floor = torch.maximum(floor, peak + math.log(params.min_p))
    return floor


def probabilities(scores: torch.Tensor) -> torch.Tensor:
    """# [n, V] -> [n, V] float32"""
    return scores.softmax(-1)


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
    weights, ids, peak = _entrants(scores, params)
    check_finite(peak.flatten().tolist(), positions)
    winners = race(weights, seeds, positions, stream, ids).unsqueeze(1)
    return list(map(int, (winners if ids is None else ids.gather(1, winners)).flatten().tolist()))


def _entrants(scores: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Weights to draw by, the token ids of their columns (None: all), each row's peak. # [n, k], [n, k], [n, 1]"""
    peak = scores.amax(-1, keepdim=True)
    if not _filters(params):
        return (scores - peak).exp_(), None, peak
    values, ids = _candidates(scores, params)
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


def check_finite(peaks: abc.Sequence[float], positions: Ids) -> None:
    """Refuse rows with NaN or +inf in them, which a maximum keeps, and rows where every score is -inf.

    Raises:
        NumericsError: with the first such row.
    """
    for peak, position in zip(peaks, positions, strict=True):
        if not math.isfinite(peak):
            cause = "every token is masked" if peak < 0 else "the model overflowed, or a processor divided by zero"
            advice = "relax logit_bias and processors" if peak < 0 else "load it in bfloat16 or float32"
            raise NumericsError(f"the largest score at position {position} is {peak}: {cause}; {advice}")


class Drawn(NamedTuple):
    """A drafter's guess. `confidence` is its own probability of `token`, `probs` what the token was drawn from.

    A NaN confidence means that the logits were NaN or infinite; `token` then means nothing.
    """

    token: int
    confidence: float
    probs: torch.Tensor | None = None  # [V] float32; None: nothing a verifier needs (greedy, coupled)


def is_plain(request: Request) -> bool:
    """Whether its drafts are drawn from temperature and the target's noise alone: nothing processes their scores."""
    p = request.params
    processed = p.logit_bias or _penalises(p) or _filters(p) or request.steering.active
    return not processed and (p.greedy or p.verifier == "coupled")


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
        alone = bool(params.logit_bias) or _penalises(params) or request.steering.active
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
