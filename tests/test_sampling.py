"""Processing is transformers' and the same bits in any company; a choice is a draw from p, fixed by its place."""

import math

import planted_bugs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from foredraft.errors import NumericsError, RequestError
from foredraft.noise import Stream, exponential
from foredraft.sampling import choose, draw, logprobs
from foredraft.scores import adjust, probabilities, process, restrict
from foredraft.types import Request, SamplingParams

VOCAB = 300
PREFIX, PROMPT_LEN = [5, 9, 5, 7, 9], 2
PATHS = [(), (1,), (1, 5), (1, 5, 1)]
SETTINGS = [
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_k=20),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.05),
    SamplingParams(temperature=0.9, top_k=100, top_p=0.9, min_p=0.01),
]


class Ban(LogitsProcessor):
    """No token may come twice in a row; writes in place, as some do."""

    def __call__(self, input_ids, scores):
        scores[:, input_ids[0, -1]] = -math.inf
        return scores


def random_logits(rows: int = 4, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def new_request(params: SamplingParams, seed: int = 1, tokens: tuple[int, ...] = tuple(PREFIX)) -> Request:
    return Request(list(tokens), params, seed, lambda token: False, prompt_len=PROMPT_LEN)


def by_transformers(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Each row through transformers' processors alone, with its own prefix."""
    rows = []
    for row, path in zip(logits, PATHS, strict=True):
        prefix, scores = [*PREFIX, *path], row.clone().float().unsqueeze(0)
        for token, bias in params.logit_bias.items():
            scores[0, token] += bias
        ids = torch.tensor([prefix])
        if params.repetition_penalty != 1:
            scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
        for token in set(prefix[PROMPT_LEN:]):
            count = prefix[PROMPT_LEN:].count(token)
            scores[0, token] -= params.frequency_penalty * count + params.presence_penalty
        for processor in params.processors:
            scores = processor(ids, scores)
        warpers = [TemperatureLogitsWarper(params.temperature)] if params.temperature else []
        warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
        warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
        warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
        for warper in warpers:
            scores = warper(ids, scores)
        rows.append(scores)
    return torch.cat(rows)


def deviation(processing, params: SamplingParams) -> float:
    """The largest difference from transformers' scores, infinite where the supports differ."""
    logits = random_logits()
    ours, theirs = processing(logits, PREFIX, PATHS, PROMPT_LEN, params), by_transformers(logits, params)
    if not torch.equal(ours == -math.inf, theirs == -math.inf):
        return math.inf
    return float((ours - theirs).nan_to_num_(0.0).abs().max())


PENALTIES = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "logit_bias": {5: 2.0, 8: -9.0},
}


@pytest.mark.parametrize(
    "params",
    [
        *SETTINGS,
        SamplingParams(**PENALTIES),
        SamplingParams(temperature=0.8, top_p=0.7, **PENALTIES, processors=(Ban(),)),
        SamplingParams(repetition_penalty=0.8),
        SamplingParams(presence_penalty=-1.0),
    ],
)
def test_scores_are_those_of_transformers(params):
    assert deviation(process, params) < 1e-5


@pytest.mark.parametrize("planted", [planted_bugs.one_prefix_for_all, planted_bugs.shifted_prefix])
@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_bug_9_wrong_prefix_is_found(planted, penalty):
    params = SamplingParams(**{penalty: 1.5})
    assert deviation(adjust, params) < 1e-5 < deviation(planted, params)


def test_bug_15_custom_processors_are_called():
    params = SamplingParams(processors=(Ban(),))
    assert deviation(adjust, params) == 0
    assert deviation(planted_bugs.processors_dropped, params) == math.inf


def keeps_input(processing, params: SamplingParams) -> bool:
    logits = random_logits()
    before = logits.clone()
    processing(logits, PREFIX, PATHS, PROMPT_LEN, params)
    return torch.equal(before, logits)


@pytest.mark.parametrize("params", [*SETTINGS, SamplingParams(**PENALTIES, processors=(Ban(),))])
def test_bug_2_logits_are_never_written_to(params):
    assert keeps_input(process, params)
    assert keeps_input(
        lambda logits, *_: [choose(logits, params, 1, range(4)), draw(logits, [new_request(params)] * 4, PATHS)], params
    )


def test_bug_2_planted_is_found():
    assert not keeps_input(planted_bugs.scaled_in_place, SETTINGS[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.5, 0.9, 0.99, 0.999]), st.sampled_from([2, 63, 64, 65, 5000]))
def test_nucleus_is_that_of_transformers(seed, top_p, vocab):
    scores = random_logits(3, vocab, seed)
    ours = restrict(scores, SamplingParams(temperature=1, top_p=top_p)) > -math.inf
    theirs = TopPLogitsWarper(top_p)(None, scores) > -math.inf
    kept = (scores.double().softmax(-1) * (ours & theirs)).sum(-1)
    differ = (scores.double().softmax(-1) * (ours ^ theirs)).sum(-1)
    assert bool(((differ == 0) | ((kept - top_p).abs() < 1e-5) | ((kept + differ - top_p).abs() < 1e-5)).all())


@pytest.mark.parametrize("params", SETTINGS[1:])
def test_tokens_that_tie_share_their_fate(params):
    scores = random_logits(4, 2000).round()  # many ties, at every threshold
    kept = restrict(scores, params) > -math.inf
    for row, chosen in zip(scores, kept, strict=True):
        assert set(row[chosen].tolist()).isdisjoint(row[~chosen].tolist())
        assert 0 < int(chosen.sum()) < 2000


@pytest.mark.parametrize(
    "params", [SamplingParams(), *SETTINGS, SamplingParams(temperature=1, **PENALTIES, processors=(Ban(),))]
)
@pytest.mark.parametrize("vocab", [VOCAB, 4099])
def test_a_row_does_not_depend_on_its_company(params, vocab):
    logits = random_logits(33, vocab).to(torch.bfloat16)  # bfloat16: with ties
    paths = [tuple(range(i)) for i in range(33)]
    positions = range(50, 83)
    together = adjust(logits, PREFIX, paths, PROMPT_LEN, params)
    tokens, filtered = choose(together, params, 3, positions), restrict(together, params)
    for i in range(33):
        alone = adjust(logits[i : i + 1], PREFIX, paths[i : i + 1], PROMPT_LEN, params)
        assert torch.equal(alone[0], together[i])
        assert torch.equal(restrict(alone, params)[0], filtered[i])
        assert choose(alone, params, 3, positions[i : i + 1]) == tokens[i : i + 1]


def fit(counts: torch.Tensor, p: torch.Tensor) -> float:
    """p-value of a chi-square test that the counts come from p; what is expected less than 5 times is one cell."""
    expected = p.double() / p.double().sum() * counts.sum()
    rare = expected < 5
    seen = torch.cat((counts[~rare], counts[rare].sum()[None]))
    wanted = torch.cat((expected[~rare], expected[rare].sum()[None]))
    return float(stats.chisquare(seen[wanted > 0].numpy(), wanted[wanted > 0].numpy()).pvalue)


@pytest.mark.parametrize("params", SETTINGS)
def test_choice_is_a_draw_from_p(params):
    """Chi-square over 20,000 positions; against a p of another temperature the same test must fail."""
    scores = adjust(random_logits(1, 40), (), [()], 0, params)
    draws = 20_000
    tokens = torch.tensor(choose(scores.expand(draws, -1), params, 11, range(draws)))
    counts = tokens.bincount(minlength=40)

    p = probabilities(restrict(scores, params))[0]
    assert int(counts[p == 0].sum()) == 0
    assert fit(counts, p) > 1e-4
    assert fit(counts, probabilities(restrict(scores / 1.2, params))[0]) < 1e-4


def test_choice_is_the_gumbel_maximum():
    scores = random_logits(8)
    gumbel = -exponential(4, range(8), VOCAB).double().log()
    expected = (scores.double() + gumbel).argmax(-1).tolist()
    assert choose(scores, SamplingParams(temperature=1), 4, range(8)) == expected


def test_temperature_towards_zero_is_greedy():
    logits = random_logits(64)
    cold = SamplingParams(temperature=1e-6)
    scores = adjust(logits, (), [()] * 64, 0, cold)
    assert (
        choose(scores, cold, 5, range(64))
        == choose(logits, SamplingParams(), 5, range(64))
        == logits.argmax(-1).tolist()
    )


def test_greedy_takes_the_first_of_equals():
    assert choose(torch.tensor([[0.0, 2.0, 2.0]]), SamplingParams(), 0, [0]) == [1]


@pytest.mark.parametrize("params", [SamplingParams(), *SETTINGS])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(params, bad):
    logits = random_logits(3)
    logits[1, slice(None) if bad < 0 else 17] = bad
    scores = adjust(logits, (), [()] * 3, 0, params)
    with pytest.raises(NumericsError, match=f"position 8 is {bad if bad < 0 or params.greedy else ''}"):
        choose(scores, params, 0, [7, 8, 9])
    drawn = draw(logits, [new_request(params)] * 3, [()] * 3)
    assert [math.isnan(guess.confidence) for guess in drawn] == [False, True, False]
    assert len(choose(scores[::2], params, 0, [7, 9])) == 2


def test_masked_tokens_are_legitimate():
    logits = torch.full((1, 100), -math.inf).index_fill_(1, torch.tensor([42]), 1.0)
    for params in (SamplingParams(), *SETTINGS):
        assert choose(adjust(logits, (), [()], 0, params), params, 0, [0]) == [42]


def test_wrong_requests_say_what_is_wrong():
    with pytest.raises(RequestError, match=r"logit_bias names tokens \[300\]"):
        adjust(random_logits(1), PREFIX, [()], 2, SamplingParams(logit_bias={300: 1.0}))

    class Shrink(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores[:, :-1]

    with pytest.raises(RequestError, match="Shrink returned shape"):
        adjust(random_logits(1), PREFIX, [()], 2, SamplingParams(processors=(Shrink(),)))


@pytest.mark.parametrize("params", [SamplingParams(), *SETTINGS, SamplingParams(temperature=0.8, **PENALTIES)])
def test_a_drafter_with_the_targets_logits_draws_the_targets_tokens(params):
    logits, request = random_logits(), new_request(params)
    scores = adjust(logits, PREFIX, PATHS, PROMPT_LEN, params)
    wanted = choose(scores, params, request.seed, [5, 6, 7, 8])
    drawn = draw(logits, [request] * 4, PATHS)
    assert [guess.token for guess in drawn] == wanted
    p = probabilities(restrict(scores, params))
    for row, guess in enumerate(drawn):
        assert guess.probs is None
        assert guess.confidence == pytest.approx(float(p[row, guess.token]), rel=1e-4)


def test_draws_of_a_batch_are_those_of_each_alone():
    several = [SamplingParams(), *SETTINGS, SamplingParams(temperature=0.8, **PENALTIES), SETTINGS[0], SamplingParams()]
    requests = [new_request(params, seed, (5, 9, *range(seed))) for seed, params in enumerate(several)]
    paths = [tuple(range(i % 3)) for i in range(len(several))]
    logits = random_logits(len(several))
    together = draw(logits, requests, paths)
    alone = [draw(logits[i : i + 1], requests[i : i + 1], paths[i : i + 1])[0] for i in range(len(several))]
    assert [guess.token for guess in together] == [guess.token for guess in alone]


def test_bug_1_rejection_drafts_are_drawn_from_the_distribution_they_report():
    """And with noise that is neither the target's nor that of another block."""
    params = SamplingParams(temperature=0.7, top_k=20, verifier="rejection")
    logits = random_logits(1, 30)
    requests = [new_request(params, seed) for seed in range(5000)]
    drawn = draw(logits.expand(5000, -1), requests, [()] * 5000)
    counts = torch.tensor([guess.token for guess in drawn]).bincount(minlength=30)
    q = drawn[0].probs
    assert torch.allclose(q, probabilities(process(logits, (), [()], 0, params))[0], atol=1e-7)
    assert fit(counts, q) > 1e-4
    argmax_draft = torch.zeros_like(counts).index_fill_(0, logits[0].argmax(), 5000)
    assert fit(argmax_draft, q) < 1e-4
    targets = [choose(logits / 0.7, params, seed, [5])[0] for seed in range(200)]
    assert [guess.token for guess in drawn[:200]] != targets
    later = [new_request(params, seed, (*PREFIX, 1)) for seed in range(200)]
    again = draw(logits.expand(200, -1), later, [()] * 200)
    ahead = draw(logits.expand(200, -1), requests[:200], [(1,)] * 200)  # the same position, drafted one block earlier
    assert [guess.token for guess in again] != [guess.token for guess in ahead]


def test_logprobs_are_of_the_raw_distribution():
    logits = random_logits(2).to(torch.bfloat16)
    found = logprobs(logits, [3, 250], 2)
    wanted = logits.double().log_softmax(-1)
    for row, (token, one) in enumerate(zip([3, 250], found, strict=True)):
        assert one.token == token
        assert one.logprob == pytest.approx(float(wanted[row, token]), abs=1e-5)
        assert one.logprob < 0
        assert [token for token, _ in one.top] == wanted[row].topk(2).indices.tolist()
    assert logprobs(logits, [3, 250], 0)[0].top == ()


def test_streams_are_independent_choices():
    scores, params = random_logits(1, 30).expand(400, -1) / 3, SamplingParams(temperature=1)
    target = choose(scores, params, 1, range(400))
    assert target == choose(scores, params, 1, range(400))
    other = choose(scores, params, 1, range(400), Stream.DRAFT)
    same = sum(a == b for a, b in zip(target, other, strict=True)) / 400
    assert same < 0.3
