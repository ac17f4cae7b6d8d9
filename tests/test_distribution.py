"""`rejection` keeps the distribution: the engine's output against exact enumeration, with planted bugs that must show.

The target is a table, so the probability of every continuation is known. A seed is a sample; all seeds are fixed, so no
test is flaky. Two planted bugs are the field's own: see REJECTED below.
"""

from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from fakes import Ask, Scripted, TableModel, play
from scipy import stats

import foredraft
import foredraft.verify
from foredraft.drafters.base import NoDrafter
from foredraft.drafters.model import ModelDrafter
from foredraft.engine import Engine
from foredraft.policy import Fixed, Threshold
from foredraft.scores import process
from foredraft.types import Draft, SamplingParams

VOCAB, AHEAD, SAMPLES = 4, 3, 1500
PROMPT = [1, 3]
LIKELY, UNLIKELY = 1e-3, 1e-6
PARAMS = {
    "plain": SamplingParams(temperature=1.0, verifier="rejection", max_new_tokens=AHEAD),
    "filtered": SamplingParams(temperature=0.7, top_k=3, top_p=0.95, verifier="rejection", max_new_tokens=AHEAD),
    "penalised": SamplingParams(
        temperature=1.3, repetition_penalty=1.4, frequency_penalty=0.8, verifier="rejection", max_new_tokens=AHEAD
    ),
}
DRAWS = 700  # from the bundled pair
BUNDLED = Path(foredraft.__file__).parent / "bundled"


class Argmax(Scripted):
    """Drafts the likeliest token of a table model; `claims` says it was drawn from the softmax, which it was not."""

    name = "argmax"

    def __init__(self, model: TableModel, claims: bool = False) -> None:
        self.model, self.claims = model, claims

    def propose(self, sequences, policy):
        return [self.draft(s) for s in sequences]

    def draft(self, request) -> Draft:
        tokens: list[int] = []
        rows = []
        while len(tokens) < request.draft_limit:
            logits = self.model.next_logits(request.token_ids + tokens)
            rows.append(process(logits[None], request.token_ids, [tokens], request.prompt_len, request.params))
            tokens.append(int(rows[-1].argmax()))
        return Draft(tuple(tokens), self.name, probs=torch.cat(rows).softmax(-1) if self.claims and rows else None)


def target() -> TableModel:
    return TableModel(VOCAB, seed=1)


def drafter(name: str):
    other = TableModel(VOCAB, seed=4)
    made = {
        "none": NoDrafter,
        "model": lambda: ModelDrafter(other, VOCAB),
        "argmax": lambda: Argmax(other),
        "claims to be drawn": lambda: Argmax(other, claims=True),
    }
    return made[name]()


def exact(params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every continuation, token by token, from the table alone."""
    model = target()
    probabilities = {}
    for path in product(range(VOCAB), repeat=AHEAD):
        chance = 1.0
        for i, token in enumerate(path):
            logits = model.next_logits([*PROMPT, *path[:i]])
            chance *= float(process(logits[None], PROMPT, [path[:i]], len(PROMPT), params).softmax(-1)[0, token])
        probabilities[path] = chance
    return probabilities


def sample(params: SamplingParams, made, policy=None, gamma: int | None = None) -> Counter[tuple[int, ...]]:
    engine = Engine(target(), made, policy or Fixed(AHEAD), max_batch_size=64, max_model_len=64)
    asks = [Ask(PROMPT, params, seed, num_draft_tokens=gamma) for seed in range(SAMPLES)]
    return Counter(tuple(request.output_ids) for request in play(engine, asks))


def p_value(observed: Counter, probabilities: dict) -> float:
    """Chi-square against exact probabilities; outcomes expected fewer than 5 times share a cell."""
    total = sum(observed.values())
    common = [outcome for outcome, chance in probabilities.items() if chance * total >= 5]
    seen = [observed[outcome] for outcome in common]
    expected = [probabilities[outcome] * total for outcome in common]
    rest = total - sum(expected)
    if rest > 1e-6 * total:
        seen, expected = [*seen, total - sum(seen)], [*expected, rest]
    elif sum(seen) < total:
        return 0.0  # something impossible happened
    return float(stats.chisquare(seen, expected, sum_check=False).pvalue)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("name", ["none", "model", "argmax"])
def test_output_has_the_targets_distribution(name, params):
    assert p_value(sample(params, drafter(name)), exact(params)) > LIKELY


@pytest.mark.parametrize("gamma", [1, 2])
def test_so_it_has_with_short_drafts(gamma):
    params = PARAMS["plain"]
    assert p_value(sample(params, drafter("model"), gamma=gamma), exact(params)) > LIKELY


def test_so_it_has_when_confidence_ends_drafts():
    """A token is drafted, its confidence looked at, and kept: stopping there must not bias what follows."""
    params = PARAMS["plain"]
    made = sample(params, drafter("model"), policy=Threshold(AHEAD, threshold=0.5, adaptive=False))
    assert p_value(made, exact(params)) > LIKELY


def test_so_has_the_coupled_verifier():
    params = SamplingParams(temperature=1.0, max_new_tokens=AHEAD)
    assert p_value(sample(params, drafter("model")), exact(params)) > LIKELY


def inverted(p: float, q: float) -> float:
    return min(1.0, q / p) if p else 1.0


def argmaxed(p, token, q):
    rest = (p - (q if q is not None else torch.nn.functional.one_hot(torch.tensor(token), len(p)))).clamp(min=0)
    return torch.nn.functional.one_hot(rest.argmax(), len(p)).float()


def softmaxed(p, token, q):
    return p.softmax(-1)


REJECTED = {"acceptance": inverted, "residual (argmax)": argmaxed, "residual (softmax)": softmaxed}


@pytest.mark.parametrize("bug", REJECTED)
def test_planted_bug_is_found(bug, monkeypatch):
    """OpenVINO's inverted ratio (#4190) and Xinference's residuals."""
    monkeypatch.setattr(foredraft.verify, bug.split()[0], REJECTED[bug])
    assert p_value(sample(PARAMS["plain"], drafter("model")), exact(PARAMS["plain"])) < UNLIKELY


def test_planted_bug_argmax_draft_with_softmax_q_is_found():
    """Draft & Verify's sampling mode and LMFlow's: q must be what the token was drawn from."""
    params = PARAMS["plain"]
    assert p_value(sample(params, drafter("claims to be drawn")), exact(params)) < UNLIKELY


def test_planted_bug_a_dropped_token_is_found():
    """Throwing a drafted token away because the drafter was unsure of it biases what is kept."""

    class Drops(ModelDrafter):
        def propose(self, sequences, policy):
            return [self.cut(draft) for draft in super().propose(sequences, policy)]

        def cut(self, draft: Draft) -> Draft:
            sure = next((i for i, c in enumerate(draft.confidences) if c < 0.5), len(draft))
            return Draft(draft.tokens[:sure], self.name, probs=draft.probs[:sure] if sure else None)

    params = PARAMS["plain"]
    assert p_value(sample(params, Drops(TableModel(VOCAB, seed=4), VOCAB)), exact(params)) < UNLIKELY


@pytest.mark.skipif(not (BUNDLED / "target" / "config.json").exists(), reason="the bundled pair is not there yet")
def test_bundled_pair():
    """Two tokens ahead from a real prompt, with and without drafts: two samples of one distribution."""
    from foredraft import LLM

    llm = LLM(device="cpu", max_batch_size=64, max_model_len=128)
    params = SamplingParams(temperature=1.0, top_k=12, verifier="rejection", max_new_tokens=3)
    prompt = llm.encode("User: I need a table for two in")

    def outcomes(gamma: int, first: int) -> Counter:
        each = [replace(params, seed=first + i) for i in range(DRAWS)]
        results = llm.generate([prompt] * len(each), each, num_draft_tokens=gamma)
        assert (sum(r.stats.drafted for r in results) > 0) == (gamma > 0)
        return Counter(tuple(r.token_ids[:2]) for r in results)

    plain, drafted = outcomes(0, 0), outcomes(3, 10**6)
    common = [outcome for outcome, n in (plain + drafted).items() if n >= 16]
    rows = [[counts[outcome] for outcome in common] for counts in (plain, drafted)]
    table = [[*row, DRAWS - sum(row)] for row in rows]
    assert stats.chi2_contingency(table).pvalue > LIKELY
