"""From logits and a true prefix to processed scores; the same code for target and drafters.

A row's result has the same bits whatever other rows are in the call: every step is elementwise or compares a row with
its own maximum and order; the one sum that decides anything (top_p) is taken in float64. Knows nothing of models,
noise or drafts.

Order, as in vLLM and transformers: logit_bias, penalties, custom processors, temperature, top_k, top_p, min_p.
"""

import math
from collections import abc

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from foredraft.errors import RequestError
from foredraft.steering import Steering
from foredraft.types import SamplingParams

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
    if params.penalises:
        scores = _penalise(scores, prefix, paths, prompt_len, params)
    steering = Steering(params.processors) if steering is None else steering
    if steering.active:
        scores = steering.apply(scores, prefix, paths)
    return scores if params.temperature in (0, 1) else scores / params.temperature


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
    if not filters(params):
        return scores
    values, ids = candidates(scores, params)
    return torch.full_like(scores, -math.inf).scatter_(1, ids, values)


def filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def candidates(scores: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and ids of a set that holds every token the filters keep; -inf for others. # 2 x [n, width]

    The sets of transformers' TopK-, TopP- and MinPLogitsWarper in this order (its top_p cuts ties at random, here all
    that tie with the last one kept are kept), without sorting the vocabulary: looks at the likeliest tokens only, at 8
    times as many when some row keeps them all, or may have more that tie with the last of top_k, whose mass counts.
    """
    peak = scores.amax(-1, keepdim=True)
    total = (scores - peak).exp_().sum(-1, keepdim=True, dtype=torch.float64) if params.top_k == 0 else None
    width = max(_CANDIDATES, params.top_k + 1)
    while True:
        values, ids = scores.topk(min(width, scores.shape[1]))
        floor = _floor(values, peak, total, params)
        last = values[:, -1:]
        tied = last == values[:, min(params.top_k, values.shape[1]) - 1, None] if params.top_k else last == math.inf
        if width >= scores.shape[1] or bool((((last < floor) & ~tied) | (last == -math.inf)).all()):
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
