"""Tokens drawn in the native library: those that torch draws, row by row, whatever filters the request has."""

import math
from itertools import product
from random import Random

import pytest
import torch

from foredraft import SamplingParams, sampling
from foredraft.errors import NumericsError
from foredraft.native import choosing, library
from foredraft.native.choosing import Place, Sampler
from foredraft.scores import adjust, restrict
from foredraft.types import Draft, Request
from foredraft.verify import verify

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
ALONE = (
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 9999},
    {"top_p": 0.9},
    {"top_p": 0.3, "min_p": 0.02},
    {"min_p": 0.1},
)
PAIRS = ({"top_k": 40, "top_p": 0.95}, {"top_k": 5, "top_p": 0.5, "min_p": 0.2}, {"top_p": 1e-9}, {"top_p": 0.9999})


def rows(kind: str, vocab: int, seed: int) -> torch.Tensor:
    """Logits [4, V]: spread out, flat, with many equals, or mostly masked."""
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(seed))
    if kind == "masked":
        logits[:, torch.arange(vocab) % 11 != 3] = -math.inf
    return {"flat": 0.1 * logits, "equals": (4 * logits).round()}.get(kind, 3 * logits)


def by_torch(scores: torch.Tensor, params: SamplingParams, seed: int, positions: list[int]) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "serves", lambda scores: False)
        return sampling.choose(scores, params, seed, positions)


@pytest.mark.parametrize("kind", ["spread", "flat", "equals", "masked"])
@pytest.mark.parametrize("filters", ALONE + PAIRS, ids=str)
def test_a_row_gets_the_token_that_torch_draws(filters, kind):
    source = Random(str(filters))
    for vocab, temperature in product((17, 64, 4099), (0.4, 1.0, 1.7)):
        params = SamplingParams(temperature=temperature, **filters)
        for seed in range(8):
            logits, positions = rows(kind, vocab, seed), [source.randrange(10**6) for _ in range(4)]
            scores = adjust(logits, [1], [()], 1, params)
            before = logits.clone()
            drawn, peaks, sure = choosing.choose(logits, sampling.sampler(params), Place([seed] * 4, positions, 0))
            assert (
                drawn == sampling.choose(scores, params, seed, positions) == by_torch(scores, params, seed, positions)
            )
            chances = restrict(scores, params).softmax(-1).gather(1, torch.tensor(drawn)[:, None]).flatten()
            assert torch.tensor(sure) == pytest.approx(chances, rel=1e-4)
            assert peaks == scores.amax(-1).tolist() and torch.equal(logits, before)


def test_without_a_temperature_the_first_of_the_largest_is_taken():
    for vocab, seed in product((5, 16, 17, 4099), range(6)):
        logits = rows("equals", vocab, seed)
        drawn, peaks, _ = choosing.choose(logits, Sampler(), Place([0] * 4, range(4), 0))
        assert (drawn, peaks) == sampling.best(logits)


@pytest.mark.parametrize("place", [0, 15, 16, 20])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.5)], ids=str)
def test_no_numbers_are_refused_where_the_text_gets_to_them(params, bad, place):
    """Row 1 is spoilt: a draft that is refused before it never gets there."""
    logits = rows("spread", 21, 0)[:2]
    request = Request([1, 2], params, 5, lambda token: False)
    (first,) = sampling.follow(logits[:1], (), request)
    logits[1, place] = bad
    with pytest.raises(NumericsError, match="position 3"):
        verify(Draft((first,)), logits, request)
    refused = verify(Draft(((first + 1) % 21,)), logits, request)
    assert refused.next_token == first and not refused.accepted


def test_a_row_with_nothing_but_masked_tokens_is_refused():
    for params in (SamplingParams(), SamplingParams(temperature=1.0, top_k=3, top_p=0.5)):
        with pytest.raises(NumericsError, match=r"every token is masked; relax .* or the form$"):
            verify(Draft(), torch.full((1, 21), -math.inf), Request([1], params, 5, lambda token: False))


def test_all_that_tie_with_the_last_of_top_k_count_for_top_p():
    """More of them than a filter looks at first: of 74 kept by top_k, top_p ends among those that tie."""
    logits = torch.full((1, 300), -9.0)
    logits[0, :39], logits[0, 39:74] = 10.0, 9.0
    params = SamplingParams(temperature=1.0, top_k=40, top_p=0.95)
    kept = restrict(logits, params).isfinite()
    assert int(kept.sum()) == 74
    for seed in range(40):
        drawn, _, sure = choosing.choose(logits, sampling.sampler(params), Place([seed], [0], 0))
        assert drawn == by_torch(logits, params, seed, [0])
        assert sure[0] == pytest.approx(float(logits[kept].softmax(0)[drawn[0]]), rel=1e-4)
