"""The rejection verifier's exact output distribution, by enumeration; drafts are wrong, and planted bugs must be found.

Target and drafter are Markov chains, `p[a]` and `q[a]` the distributions after token a. The real `rejection` runs once
for each way it can end, with its uniforms forced and its last draw read off, so that nothing is left to chance.
"""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import planted_bugs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foredraft import verify as module
from foredraft.drafters import forced
from foredraft.types import Draft
from foredraft.verify import acceptance, rejection, residual

VOCAB, START = 4, 0
EXACT, WRONG = 1e-6, 1e-2


def chain(seed: int, sharpness: float = 1.5) -> torch.Tensor:
    """A random transition table, rounded once, with a token of probability 0 in every row. # [V, V] float64"""
    logits = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * sharpness
    table = logits.double().softmax(-1)
    table[torch.arange(VOCAB), (torch.arange(VOCAB) + seed) % VOCAB] = 0
    return table / table.sum(-1, keepdim=True)


def joint(table: torch.Tensor, tokens: tuple[int, ...], after: int = START) -> float:
    """The chain's probability of `tokens` after `after`."""
    return math.prod(float(table[a, b]) for a, b in itertools.pairwise((after, *tokens)))


def drawn_blocks(q: torch.Tensor, length: int):
    """Every block an honest drafter can draw, with its probability. # (float, Draft)"""
    for tokens in itertools.product(range(VOCAB), repeat=length):
        if (chance := joint(q, tokens)) > 0:
            yield chance, Draft(tokens, probs=q[torch.tensor([START, *tokens[:-1]])] if tokens else None)


def endings(draft: Draft, p: torch.Tensor, check, monkeypatch):
    """Each way a check can end: its probability, the verdict, and the distribution of its last token."""
    chances = module._acceptances(draft, p)
    for refused in range(len(draft) + 1):
        chance = math.prod(chances[:refused]) * (1 - chances[refused] if refused < len(draft) else 1)
        if chance <= 0:
            continue
        forced = torch.tensor([0.0] * refused + [1 - 2**-53] * (len(draft) - refused), dtype=torch.float64)
        raced: list[torch.Tensor] = []
        with monkeypatch.context() as patch:
            patch.setattr(module.noise, "uniform", lambda *_, forced=forced: forced.unsqueeze(1))
            patch.setattr(module, "race", lambda weights, *_, raced=raced: raced.append(weights[0]) or torch.tensor(0))
            verdict = check(draft, p, 0, range(len(draft) + 1))
        yield chance, verdict, raced[0] / raced[0].sum()


def output_distance(p: torch.Tensor, blocks, monkeypatch, check=rejection, bonus=None, length: int = 3) -> float:
    """Total variation between the check's output and the target, over texts of `length` + 1 tokens.

    What a block leaves open is filled by the target itself, so only the block is under test.
    """
    output = dict.fromkeys(itertools.product(range(VOCAB), repeat=length + 1), 0.0)
    for drafted, draft in blocks:
        rows = p[torch.tensor([START, *draft.tokens])]
        if bonus is not None:
            rows = torch.cat((rows[:-1], bonus[None, draft.tokens[-1] if draft.tokens else START]))
        for chance, verdict, last in endings(draft, rows, check, monkeypatch):
            kept = tuple(draft.tokens[i] for i in verdict.accepted)
            for tail in itertools.product(range(VOCAB), repeat=length + 1 - len(kept)):
                output[kept + tail] += drafted * chance * float(last[tail[0]]) * joint(p, tail[1:], tail[0])
    assert sum(output.values()) == pytest.approx(1, abs=1e-9)
    return sum(abs(chance - joint(p, text)) for text, chance in output.items()) / 2


def accepted_share(p: torch.Tensor, blocks, monkeypatch) -> float:
    """Expected number of tokens kept."""
    found = (
        (d, endings(draft, p[torch.tensor([START, *draft.tokens])], rejection, monkeypatch)) for d, draft in blocks
    )
    return sum(drafted * chance * len(verdict.accepted) for drafted, ends in found for chance, verdict, _ in ends)


@pytest.mark.parametrize("length", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_rejection_is_lossless(length, seed, monkeypatch):
    p, q = chain(seed), chain(seed + 100)
    blocks = list(drawn_blocks(q, length))
    assert output_distance(p, blocks, monkeypatch, length=length) < EXACT
    if length:
        kinds = {verdict.kind for _, draft in blocks for _, verdict, _ in ends_of(draft, p, monkeypatch)}
        assert kinds == {"recovered", "bonus"}


def ends_of(draft: Draft, p: torch.Tensor, monkeypatch):
    return endings(draft, p[torch.tensor([START, *draft.tokens])], rejection, monkeypatch)


def argmax_block(q: torch.Tensor, length: int, reported: bool) -> Draft:
    """The drafter's likeliest tokens; with `reported`, said to be drawn from q."""
    tokens: list[int] = []
    for _ in range(length):
        tokens.append(int(q[tokens[-1] if tokens else START].argmax()))
    return Draft(tuple(tokens), probs=q[torch.tensor([START, *tokens[:-1]])] if reported else None)


def test_bug_1_an_argmax_draft_is_one_hot(monkeypatch):
    p, q = chain(1), chain(101)
    assert output_distance(p, [(1.0, argmax_block(q, 3, reported=False))], monkeypatch) < EXACT
    assert output_distance(p, [(1.0, argmax_block(q, 3, reported=True))], monkeypatch) > WRONG


def test_bug_2_q_is_the_warped_distribution_that_was_drawn_from(monkeypatch):
    p, q = chain(2), chain(102)
    warped = q.log().div(0.5).softmax(-1)
    assert output_distance(p, list(drawn_blocks(warped, 3)), monkeypatch) < EXACT
    unwarped = [(chance, with_probs(draft, q)) for chance, draft in drawn_blocks(warped, 3)]
    assert output_distance(p, unwarped, monkeypatch) > WRONG


def with_probs(draft: Draft, q: torch.Tensor) -> Draft:
    return dataclasses.replace(draft, probs=q[torch.tensor([START, *draft.tokens[:-1]])])


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("residual", planted_bugs.argmaxed_residual),  # 3
        ("residual", planted_bugs.softmaxed_residual),  # 3
        ("acceptance", planted_bugs.inverted_ratio),  # 5
        ("acceptance", planted_bugs.accept_everything),  # 18
    ],
)
def test_bugs_3_5_18_are_found(name, planted, monkeypatch):
    p, q = chain(3), chain(103)
    monkeypatch.setattr(module, name, planted)
    assert output_distance(p, list(drawn_blocks(q, 3)), monkeypatch) > WRONG


def test_bug_5_late_rejection_is_found(monkeypatch):
    p, q = chain(3), chain(103)
    assert output_distance(p, list(drawn_blocks(q, 3)), monkeypatch, check=planted_bugs.late_rejection) > WRONG


def test_bug_7_a_bonus_from_unwarped_logits_is_found(monkeypatch):
    p, q = chain(4), chain(4, sharpness=1.2)
    hotter = p.log().div(2.0).softmax(-1)
    blocks = list(drawn_blocks(q, 2))
    assert output_distance(p, blocks, monkeypatch, length=2) < EXACT
    assert output_distance(p, blocks, monkeypatch, bonus=hotter, length=2) > WRONG


def test_bug_10_a_token_once_drawn_is_verified(monkeypatch):
    """Stop drafting after a doubtful token: lossless. Throw that token away: biased."""
    p, q = chain(5), chain(105)

    def stopped(discard: bool):
        for chance, draft in drawn_blocks(q, 3):
            doubts = [float(row[token]) < 0.3 for row, token in zip(draft.probs, draft.tokens, strict=True)]
            end = doubts.index(True) + (not discard) if any(doubts) else 3
            yield chance, Draft(draft.tokens[:end], probs=draft.probs[:end])

    assert output_distance(p, list(stopped(discard=False)), monkeypatch) < EXACT
    assert output_distance(p, list(stopped(discard=True)), monkeypatch) > WRONG


def test_bug_17_a_draft_like_the_target_hides_bugs(monkeypatch):
    """Why all other tests draft wrongly: with q = p not even an inverted ratio shows."""
    p, q = chain(6), chain(106)
    monkeypatch.setattr(module, "acceptance", planted_bugs.inverted_ratio)
    assert output_distance(p, list(drawn_blocks(p, 3)), monkeypatch) < EXACT
    assert output_distance(p, list(drawn_blocks(q, 3)), monkeypatch) > WRONG


def test_bug_18_acceptance_says_nothing_about_correctness(monkeypatch):
    p, q = chain(7), chain(107)
    blocks = list(drawn_blocks(q, 3))
    honest = accepted_share(p, blocks, monkeypatch), output_distance(p, blocks, monkeypatch)
    monkeypatch.setattr(module, "acceptance", planted_bugs.accept_everything)
    broken = accepted_share(p, blocks, monkeypatch), output_distance(p, blocks, monkeypatch)
    assert broken[0] > honest[0]
    assert broken[1] > WRONG > EXACT > honest[1]


distributions = st.lists(st.floats(0, 1), min_size=5, max_size=5).filter(lambda xs: sum(xs) > 1e-3)


@settings(deadline=None)
@given(distributions, distributions)
def test_one_step_gives_the_target_back(p, q):
    """sum_x q(x) [accept(x) x + (1 - accept(x)) residual] = p, and the share accepted is 1 - total variation."""
    p, q = (torch.tensor(xs, dtype=torch.float64) / sum(xs) for xs in (p, q))
    output, kept = torch.zeros(5, dtype=torch.float64), 0.0
    for token in range(5):
        if q[token] > 0:
            keep = acceptance(float(p[token]), float(q[token]))
            rest = residual(p, token, q)
            output += q[token] * (1 - keep) * rest / rest.sum()
            output[token] += q[token] * keep
            kept += float(q[token]) * keep
    assert torch.allclose(output, p, atol=EXACT)
    assert kept == pytest.approx(1 - float((p - q).abs().sum()) / 2, abs=EXACT)


@settings(deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 10**6))
def test_rejection_keeps_a_token_when_its_uniform_is_below_its_chance(seed, start):
    p, q = chain(8), chain(108)
    draft = next(
        draft for _, draft in drawn_blocks(q, 3) if 0.2 < joint(p, draft.tokens[:1]) / joint(q, draft.tokens[:1]) < 1
    )
    rows = p[torch.tensor([START, *draft.tokens])]
    key = module.noise.fold(seed, start)
    uniforms = module.noise.uniform(key, range(start, start + 3), 1, module.Stream.ACCEPT).flatten().tolist()
    ratios = [float(rows[i, t]) / float(draft.probs[i, t]) for i, t in enumerate(draft.tokens)]
    kept = [u < r for u, r in zip(uniforms, ratios, strict=True)]
    verdict = rejection(draft, rows, seed, range(start, start + 4))
    assert len(verdict.accepted) == (kept.index(False) if False in kept else 3)
    assert rows[len(verdict.accepted), verdict.next_token] > 0


def test_where_p_and_q_are_equal_up_to_rounding_the_residual_is_p():
    p = torch.tensor([0.5, 0.5])
    assert torch.equal(residual(p, 0, p), p)


def under_grammar(lead: tuple[int, ...], blocks):
    """The blocks as they are verified where a grammar forces `lead`."""
    request = SimpleNamespace(lead=lead, steering=SimpleNamespace(constraint=object()))
    for chance, draft in blocks:
        yield chance, forced._under_grammar(request, draft)


@pytest.mark.parametrize("lead", [(1,), (2, 3), (1, 2, 1)])
@pytest.mark.parametrize("length", [1, 3])
def test_a_drafter_that_ignores_what_is_forced_favours_nothing(lead, length, monkeypatch):
    """What it drew may begin with the forced tokens by chance: keeping it then, and only then, would be a bias."""
    p, q = chain(3), chain(11)
    drafted = list(under_grammar(lead, drawn_blocks(q, length)))
    assert output_distance(p, drafted, monkeypatch) < EXACT
    assert {draft.source for _, draft in drafted} == {forced.NAME}


def test_planted_bug_a_draft_kept_for_its_tokens_is_found(monkeypatch):
    def begins_with(draft: Draft, lead: tuple[int, ...]) -> bool:
        return draft.tokens[: len(lead)] == lead

    monkeypatch.setattr(forced, "_begins_with", begins_with)
    assert output_distance(chain(3), under_grammar((1,), drawn_blocks(chain(11), 1)), monkeypatch) > WRONG


def test_a_drafter_that_goes_on_behind_what_is_forced_is_kept(monkeypatch):
    p, q, lead = chain(3), chain(11), (2,)
    q[START] = torch.eye(VOCAB, dtype=q.dtype)[2]
    drafted = list(under_grammar(lead, drawn_blocks(q, 3)))
    assert output_distance(p, drafted, monkeypatch) < EXACT
    assert all(len(draft) == 3 for _, draft in drafted)
