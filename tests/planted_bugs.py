"""Mistakes that speculative decoders have shipped, planted on purpose: each must fail the check that guards against it.

Numbers are those of the list in the documentation of losslessness. Nothing outside the tests imports this.
"""

import torch

from foredraft import sampling, verify
from foredraft.scores import adjust
from foredraft.types import Draft, Verdict
from foredraft.verify import residual as true_residual


def inverted_ratio(p: float, q: float) -> float:
    """5: min(1, q/p)."""
    return min(1.0, q / max(p, 1e-30))


def accept_everything(p: float, q: float) -> float:
    """18: the best acceptance rate there is."""
    return 1.0


def argmaxed_residual(p: torch.Tensor, token: int, q: torch.Tensor | None) -> torch.Tensor:
    """3: the likeliest token of the residual instead of a draw."""
    weights = true_residual(p, token, q)
    return torch.zeros_like(p).index_fill_(0, weights.argmax(), 1.0)


def softmaxed_residual(p: torch.Tensor, token: int, q: torch.Tensor | None) -> torch.Tensor:
    """3: probabilities taken for logits."""
    return true_residual(p, token, q).softmax(-1)


def late_rejection(draft: Draft, p: torch.Tensor, seed: int, positions: range) -> Verdict:
    """5: the refused token is emitted all the same, and the one after it dropped."""
    verdict = verify.rejection(draft, p, seed, positions)
    kept = min(len(verdict.accepted) + 1, len(draft))
    return Verdict(tuple(range(kept)), verdict.next_token, verdict.kind)


def scaled_in_place(logits, prefix, paths, prompt_len, params, steering=None):
    """2: the caller's logits are divided by the temperature."""
    return logits.div_(params.temperature)


def one_prefix_for_all(logits, prefix, paths, prompt_len, params, steering=None):
    """9: penalties do not see the draft tokens before a row."""
    return adjust(logits, prefix, [()] * len(logits), prompt_len, params)


def shifted_prefix(logits, prefix, paths, prompt_len, params, steering=None):
    """9: each row is penalised with the token it is about to judge."""
    return adjust(logits, prefix, [*paths[1:], paths[-1]], prompt_len, params)


def processors_dropped(logits, prefix, paths, prompt_len, params, steering=None):
    """15: custom processors are accepted and not called."""
    return logits.float()


def noise_by_row(draft, logits, request):
    """Noise keyed by the row in the pass instead of the position in the text."""
    rows = verify.paths(draft)
    scores = adjust(logits, request.token_ids, rows, request.prompt_len, request.params)
    return verify.match(draft, sampling.choose(scores, request.params, request.seed, range(len(rows))))


def bonus_unwarped(draft, logits, request):
    """7: the token after a fully accepted draft is drawn from raw logits."""
    params, start = request.params, len(request.token_ids)
    scores = adjust(logits, request.token_ids, verify.paths(draft), request.prompt_len, params)
    scores = torch.cat((scores[:-1], logits[-1:].float()))
    return verify.match(draft, sampling.choose(scores, params, request.seed, range(start, start + len(scores))))


def temperature_zero_by_ratio(draft, logits, request):
    """4: greedy decided by p/q of softmax probabilities."""
    start = len(request.token_ids)
    return verify.rejection(draft, logits.softmax(-1), request.seed, range(start, start + len(logits)))
