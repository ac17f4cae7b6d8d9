"""Which tokens of a draft are kept, and which token follows them: pure functions of draft, distributions and seed.

- `match` (greedy and coupled): keep what equals the target's own token. Exact: the text never depends on the draft.
- `rejection` (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2): keep with probability min(1, p/q).
  Lossless: every token kept or drawn has the target's distribution.

p is the target's distribution, q the one a draft token was drawn from. Knows nothing of models and caches.
"""

from collections import abc

import torch

from foredraft import noise
from foredraft.errors import ExactnessError, VocabularyMismatchError
from foredraft.noise import Stream
from foredraft.sampling import check_finite, choose, follow, race
from foredraft.scores import adjust, probabilities, restrict
from foredraft.types import Draft, Request, Verdict


def verify(draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
    """Check a draft against the target's raw logits, as the request's sampling parameters ask. # logits [n + 1, V]

    Row 0 follows the last committed token, row i + 1 follows draft token i.

    Raises:
        ExactnessError: the draft is malformed, or a tree with the verifier `rejection`.
        NumericsError: the logits are NaN or infinite.
        VocabularyMismatchError: the draft's distributions are not over the target's vocabulary.
    """
    rows = len(draft.tokens) + 1
    assert logits.shape[0] == rows, f"{len(draft)} draft tokens need {rows} rows, not {len(logits)}"
    targets = None if draft.parents else follow(logits, draft.tokens, request)
    if targets is not None:
        return match(draft, targets)
    scores, positions = _scores(draft, logits, request)
    return _decide(draft, scores, positions, request)


def verify_reached(draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
    """As `verify`, row by row: a failure (NaN, a processor raises) is an error only if plain decoding gets to it."""
    scores, failures = [], {}
    rows = paths(draft)
    positions = [len(request.token_ids) + len(path) for path in rows]
    for i, path in enumerate(rows):
        try:
            row = _adjusted(logits[i : i + 1], request, [path])
            check_finite(row.amax(-1).tolist(), positions[i : i + 1])
        except Exception as error:  # a custom processor may raise anything
            failures[i] = error
            row = logits.new_zeros(1, logits.shape[1], dtype=torch.float32)
        scores.append(row)
    verdict = _decide(draft, torch.cat(scores), positions, request)
    for i in (0, *(i + 1 for i in verdict.accepted)):
        if i in failures:
            raise failures[i]
    return verdict


def _scores(draft: Draft, logits: torch.Tensor, request: Request) -> tuple[torch.Tensor, list[int]]:
    """Scores [n + 1, V] after everything but the filters, and the position that each row decides."""
    rows = paths(draft)
    start = len(request.token_ids)
    scores = _adjusted(logits, request, rows)
    return scores, [start + len(path) for path in rows]


def _adjusted(logits: torch.Tensor, request: Request, rows: abc.Sequence[tuple[int, ...]]) -> torch.Tensor:
    return adjust(logits, request.token_ids, rows, request.prompt_len, request.params, request.steering)


def _decide(draft: Draft, scores: torch.Tensor, positions: list[int], request: Request) -> Verdict:
    params = request.params
    if params.greedy or params.verifier == "coupled":
        return match(draft, choose(scores, params, request.seed, positions))
    check_finite(scores.amax(-1).tolist(), positions)
    return rejection(draft, probabilities(restrict(scores, params)), request.seed, positions)


def paths(draft: Draft) -> list[tuple[int, ...]]:
    """Draft tokens before each row of the target's pass: none, then each token with its ancestors. # n + 1

    Raises:
        ExactnessError: a parent does not come before its child.
    """
    if not draft.parents:
        return [draft.tokens[:i] for i in range(len(draft) + 1)]
    if len(draft.parents) != len(draft) or any(not -1 <= p < i for i, p in enumerate(draft.parents)):
        raise ExactnessError(f"draft parents {draft.parents} must name, for each token, -1 or an earlier token's index")
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        found.append((*found[parent + 1], token))
    return found


def match(draft: Draft, targets: abc.Sequence[int]) -> Verdict:
    """Follow the target's own tokens through the draft, from the root, as far as they are in it.

    `targets[0]` is the target's token after the last committed one, `targets[i + 1]` its token after draft token i.
    """
    if not draft.parents:
        kept = 0
        for token, target in zip(draft.tokens, targets, strict=False):
            if token != target:
                return Verdict(tuple(range(kept)), target, "recovered")
            kept += 1
        return Verdict(tuple(range(kept)), targets[kept], "bonus")
    parents = draft.parents
    children: dict[tuple[int, int], int] = {}
    for i, edge in enumerate(zip(parents, draft.tokens, strict=True)):
        children.setdefault(edge, i)
    accepted: list[int] = []
    node = -1
    while (child := children.get((node, targets[node + 1]))) is not None:
        accepted.append(child)
        node = child
    return Verdict(tuple(accepted), targets[node + 1], "recovered" if node in parents else "bonus")


def rejection(draft: Draft, p: torch.Tensor, seed: int, positions: abc.Sequence[int]) -> Verdict:
    """Keep draft tokens with probability min(1, p/q); after the first refusal draw from the residual. # p [n + 1, V]

    `positions[0]` is where the block starts. It is part of the key of all noise here, so that no number is used in two
    blocks: a policy that has seen what earlier noise did may have chosen this block's length by it.

    Raises:
        ExactnessError: the draft is a tree, or holds a token that its distribution gives probability 0.
        VocabularyMismatchError: p and the draft's distributions differ in shape, or a token is outside of p.
    """
    _check_drawn(draft, p)
    key = noise.fold(seed, positions[0])
    uniforms = noise.uniform(key, positions[:-1], 1, Stream.ACCEPT).flatten().tolist()
    for i, (chance, uniform) in enumerate(zip(_acceptances(draft, p), uniforms, strict=True)):
        if uniform >= chance:
            weights = residual(p[i], draft.tokens[i], None if draft.probs is None else draft.probs[i])
            token = race(weights.unsqueeze(0), key, positions[i : i + 1], Stream.RESIDUAL)
            return Verdict(tuple(range(i)), int(token), "recovered")
    token = race(p[-1:], key, positions[-1:], Stream.BONUS)
    return Verdict(tuple(range(len(draft))), int(token), "bonus")


def acceptance(p: float, q: float) -> float:
    """The probability of keeping a draft token with probabilities p and q > 0 (Leviathan et al., section 2.3)."""
    return min(1.0, p / q)


def residual(p: torch.Tensor, token: int, q: torch.Tensor | None) -> torch.Tensor:
    """Weights, not normalised, of what follows when `token`, drawn from q, was refused: max(0, p - q). # [V] -> [V]

    Without q the token was certain (q is one-hot): all others keep their p. Where nothing is left, p and q were equal
    up to rounding, and the result is p.
    """
    if q is None:
        rest = p.clone()
        rest[token] = 0
    else:
        rest = (p - q.to(p.device)).clamp_(min=0)
    return rest if bool(rest.any()) else p


def _acceptances(draft: Draft, p: torch.Tensor) -> list[float]:
    """The probability of keeping each draft token, given that those before it were kept. # n"""
    if not draft.tokens:
        return []
    tokens = torch.tensor(draft.tokens, device=p.device).unsqueeze(1)
    targets = p[:-1].gather(1, tokens).flatten().tolist()
    own = [1.0] * len(draft) if draft.probs is None else draft.probs.gather(1, tokens.to(draft.probs.device))
    drafts = own if isinstance(own, list) else own.flatten().tolist()
    if min(drafts) <= 0:
        raise ExactnessError(
            f"a token of draft {draft.tokens} has probability {min(drafts)} under the distribution it is said to be "
            "drawn from; hand over the distribution that was sampled, or probs=None for an argmax"
        )
    return [acceptance(target, drawn) for target, drawn in zip(targets, drafts, strict=True)]


def _check_drawn(draft: Draft, p: torch.Tensor) -> None:
    if not draft.is_chain:
        raise ExactnessError(
            f"verifier='rejection' checks chains, not a tree with parents {draft.parents}; use verifier='coupled'"
        )
    if draft.probs is not None and draft.probs.shape != (len(draft), p.shape[1]):
        shape, wanted = tuple(draft.probs.shape), (len(draft), p.shape[1])
        raise VocabularyMismatchError(f"draft distributions of shape {shape} != {wanted}; draft in target tokens")
    if draft.tokens and max(draft.tokens) >= p.shape[1]:
        raise VocabularyMismatchError(f"draft token {max(draft.tokens)} is outside the target's {p.shape[1]} tokens")
