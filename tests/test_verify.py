"""The text never depends on the draft, wrong ones included; trees and chains; what is refused."""

import math

import planted_bugs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foredraft import verify as module
from foredraft.errors import ExactnessError, NumericsError, VocabularyMismatchError
from foredraft.sampling import choose, draw
from foredraft.scores import adjust
from foredraft.types import Draft, Request, SamplingParams, Verdict
from foredraft.verify import match, paths, rejection, verify

# The target is a table of logits, one row for each last token.
WIDE = 24
TABLE = torch.randn(WIDE, WIDE, generator=torch.Generator().manual_seed(9)) * 2


def nothing(request: Request) -> Draft:
    return Draft()


def wrong(request: Request) -> Draft:
    """Tokens that follow no model, of a length that changes."""
    n = len(request.token_ids)
    return Draft(tuple((7 * n + 3 * i) % WIDE for i in range(n % 5)))


def tree(request: Request) -> Draft:
    """Two likely children of the root, and two of each of these."""
    first = TABLE[request.token_ids[-1]].topk(2).indices.tolist()
    second = [token for parent in first for token in TABLE[parent].topk(2).indices.tolist()]
    return Draft((*first, *second), parents=(-1, -1, 0, 0, 1, 1))


def coupled_model(request: Request, noise: float = 1.0, length: int = 4) -> Draft:
    """Draws from blurred logits, as a smaller model would."""
    blur = torch.randn(WIDE, WIDE, generator=torch.Generator().manual_seed(10)) * noise
    tokens: list[int] = []
    probs = []
    for _ in range(length):
        last = tokens[-1] if tokens else request.token_ids[-1]
        [drawn] = draw((TABLE + blur)[last : last + 1], [request], [tokens])
        tokens.append(drawn.token)
        probs.append(drawn.probs)
    return Draft(tuple(tokens), probs=None if probs[0] is None else torch.stack(probs))


def decode(drafter, params: SamplingParams, seed: int = 1, check=verify, length: int = 60) -> tuple[list[int], int]:
    """The engine's loop over the table. # tokens, tokens kept from drafts"""
    request = Request([3, 1], params, seed, lambda token: False)
    kept = 0
    while request.num_output < length:
        draft = drafter(request)
        last = [path[-1] if path else request.token_ids[-1] for path in paths(draft)]
        verdict = check(draft, TABLE[torch.tensor(last)], request)
        request.token_ids += [draft.tokens[i] for i in verdict.accepted] + [verdict.next_token]
        kept += len(verdict.accepted)
    return request.output_ids[:length], kept


GREEDY = SamplingParams()
EXACT_SETTINGS = [
    GREEDY,
    SamplingParams(repetition_penalty=1.4, frequency_penalty=0.3),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1.0, top_k=8, top_p=0.9),
    SamplingParams(temperature=0.8, repetition_penalty=1.4, presence_penalty=0.5),
]


@pytest.mark.parametrize("params", EXACT_SETTINGS)
@pytest.mark.parametrize("drafter", [wrong, tree, coupled_model, lambda s: coupled_model(s, 0.0)])
def test_the_text_does_not_depend_on_the_draft(params, drafter):
    for seed in range(5):
        plain, _ = decode(nothing, params, seed)
        drafted, kept = decode(drafter, params, seed)
        assert drafted == plain
    assert drafter is wrong or kept > 10


@pytest.mark.parametrize("planted", [planted_bugs.noise_by_row, planted_bugs.bonus_unwarped])
def test_bug_7_and_noise_by_row_change_the_text(planted):
    params = SamplingParams(temperature=0.4)
    assert decode(coupled_model, params, check=planted) != decode(nothing, params)
    assert decode(coupled_model, params, check=planted)[0] != decode(nothing, params, check=planted)[0]


@pytest.mark.parametrize("planted", [planted_bugs.one_prefix_for_all, planted_bugs.shifted_prefix])
def test_bug_9_in_the_loop_changes_the_text(planted, monkeypatch):
    params = SamplingParams(repetition_penalty=1.4, frequency_penalty=0.3)
    plain, _ = decode(nothing, params)
    monkeypatch.setattr(module, "adjust", planted)
    assert decode(lambda s: coupled_model(s, 0.0), params)[0] != plain


def is_greedy(check) -> bool:
    """Whether every token is the argmax, whatever the seed."""
    params = SamplingParams(verifier="rejection")
    token, greedy = 1, []
    for _ in range(60):
        token = int(TABLE[token].argmax())
        greedy.append(token)
    return all(decode(wrong, params, seed, check)[0] == greedy for seed in range(5))


def test_bug_4_temperature_zero_is_greedy_with_every_verifier():
    assert is_greedy(verify)
    assert not is_greedy(planted_bugs.temperature_zero_by_ratio)


def test_coupled_at_temperature_zero_is_greedy():
    cold, hot = SamplingParams(temperature=1e-7), SamplingParams(temperature=5.0)
    assert decode(coupled_model, cold) == decode(coupled_model, GREEDY)
    assert decode(nothing, hot) != decode(nothing, GREEDY)


def test_coupling_keeps_more_than_independent_draws():
    params = SamplingParams(temperature=1.0)

    def independent(request: Request) -> Draft:
        return coupled_model(Request(request.token_ids, params, request.seed + 1000, request.stop_rule))

    kept = [sum(decode(drafter, params, seed)[1] for seed in range(10)) for drafter in (coupled_model, independent)]
    assert kept[0] > 1.5 * kept[1]


def test_rejection_in_the_loop_is_the_target():
    """Counts of first tokens over many seeds, by the whole of `verify`; a fast Monte Carlo beside the enumeration."""
    params = SamplingParams(temperature=0.9, top_k=6, verifier="rejection")
    counts = torch.zeros(WIDE)
    for seed in range(3000):
        counts[decode(lambda s: coupled_model(s, 1.0, 1), params, seed, length=1)[0][0]] += 1
    p = module.probabilities(module.restrict(TABLE[1:2] / 0.9, params))[0]
    assert float((counts / 3000 - p).abs().sum()) / 2 < 0.03
    assert float(((counts > 0) ^ (p > 0)).sum()) == 0


def test_match_follows_the_path_from_the_root():
    #        root -> 5 -> 7 -> 9,  root -> 6 -> 7 -> 8
    draft = Draft((5, 6, 7, 7, 9, 8), parents=(-1, -1, 0, 1, 2, 3))
    assert paths(draft) == [(), (5,), (6,), (5, 7), (6, 7), (5, 7, 9), (6, 7, 8)]
    assert match(draft, [6, 0, 7, 0, 8, 0, 2]) == Verdict((1, 3, 5), 2, "bonus")
    assert match(draft, [6, 0, 7, 0, 9, 0, 2]) == Verdict((1, 3), 9, "recovered")
    assert match(draft, [4, 7, 7, 9, 8, 0, 2]) == Verdict((), 4, "recovered")
    assert match(Draft(), [4]) == Verdict((), 4, "bonus")


tokens = st.integers(0, 2)


@settings(deadline=None)
@given(st.lists(st.tuples(tokens, tokens), max_size=6), tokens)
def test_a_chain_is_a_tree_with_chain_parents(pairs, last):
    drafted, targets = tuple(a for a, _ in pairs), [*(b for _, b in pairs), last]
    as_tree = Draft(drafted, parents=tuple(range(-1, len(pairs) - 1)))
    verdict = match(Draft(drafted), targets)
    assert match(as_tree, targets) == verdict
    assert paths(as_tree) == paths(Draft(drafted))
    kept = len(verdict.accepted)
    assert verdict.accepted == tuple(range(kept)) and list(drafted[:kept]) == targets[:kept]
    assert verdict.next_token == targets[kept]
    assert kept == len(drafted) or drafted[kept] != targets[kept]
    assert (verdict.kind == "bonus") == (kept == len(drafted))


@st.composite
def trees(draw_from):
    size = draw_from(st.integers(0, 7))
    parents = tuple(draw_from(st.integers(-1, i - 1)) for i in range(size))
    return Draft(tuple(draw_from(st.lists(tokens, min_size=size, max_size=size))), parents=parents)


@settings(deadline=None)
@given(trees(), st.lists(tokens, min_size=8, max_size=8))
def test_a_tree_keeps_what_its_path_as_a_chain_would(draft, targets):
    verdict = match(draft, targets)
    nodes = (-1, *verdict.accepted)
    parents = draft.parents
    assert [parents[i] for i in verdict.accepted] == list(nodes[:-1])
    assert [draft.tokens[i] for i in verdict.accepted] == [targets[i + 1] for i in nodes[:-1]]
    assert verdict.next_token == targets[nodes[-1] + 1]
    children = [i for i, parent in enumerate(parents) if parent == nodes[-1]]
    assert verdict.next_token not in [draft.tokens[i] for i in children]
    assert (verdict.kind == "bonus") == (not children)


def test_rows_of_a_tree_are_judged_at_their_own_position_and_prefix():
    params = SamplingParams(temperature=1.0, repetition_penalty=1.5)
    request = Request([1, 2], params, 3, lambda token: False)
    draft = tree(request)
    rows = paths(draft)
    logits = TABLE[torch.tensor([path[-1] if path else 2 for path in rows])]
    targets = []
    for row, path in zip(logits, rows, strict=True):
        scores = adjust(row.unsqueeze(0), [*request.token_ids, *path], [()], 2, params)
        targets += choose(scores, params, 3, [2 + len(path)])
    assert verify(draft, logits, request) == match(draft, targets)


def test_what_cannot_be_honoured_is_refused():
    p = TABLE[:4, :4].softmax(-1)
    with pytest.raises(ExactnessError, match="chains, not a tree"):
        rejection(Draft((1, 2), parents=(-1, -1)), p[:3], 0, range(3))
    with pytest.raises(ExactnessError, match="probability 0"):
        rejection(Draft((1,), probs=torch.tensor([[1.0, 0, 0, 0]])), p[:2], 0, range(2))
    with pytest.raises(VocabularyMismatchError, match=r"\(1, 5\) != \(1, 4\)"):
        rejection(Draft((1,), probs=torch.ones(1, 5) / 5), p[:2], 0, range(2))
    with pytest.raises(VocabularyMismatchError, match="draft token 4 is outside"):
        rejection(Draft((4,)), p[:2], 0, range(2))
    with pytest.raises(ExactnessError, match="must name"):
        paths(Draft((1, 2), parents=(1, -1)))
    for verifier in ("coupled", "rejection"):
        request = Request([1], SamplingParams(temperature=1, verifier=verifier), 0, lambda token: False)
        with pytest.raises(NumericsError, match="position 1 is nan"):
            verify(Draft(), torch.full((1, 4), math.nan), request)


def test_a_chain_with_explicit_parents_may_be_rejected_from():
    p = TABLE[:4, :4].softmax(-1)
    plain, explicit = Draft((1, 2)), Draft((1, 2), parents=(-1, 0))
    assert rejection(plain, p[:3], 4, range(3)) == rejection(explicit, p[:3], 4, range(3))
