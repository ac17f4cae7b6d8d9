"""Processors that keep a state: exact where they are declared and copied, plain where not, found where hidden."""

import copy
import math

import numpy as np
import pytest
import torch
from fakes import Ask, Oracle, RandomDrafter, TableModel, Wrong, new_request, play
from transformers import SynthIDTextWatermarkLogitsProcessor

from foredraft import steering
from foredraft.drafters.base import NoDrafter
from foredraft.drafters.model import ModelDrafter
from foredraft.engine import Engine
from foredraft.errors import ExactnessError, RequestError
from foredraft.policy import Fixed
from foredraft.steering import Stateful, Steering
from foredraft.types import SamplingParams

VOCAB = 8
SETTINGS = (
    SamplingParams(max_new_tokens=40),
    SamplingParams(max_new_tokens=40, temperature=1.0),
    SamplingParams(max_new_tokens=40, temperature=0.8, top_k=5, repetition_penalty=1.1),
)


class Counter:
    """Another favourite token each time it is called."""

    def __init__(self, period: int = VOCAB) -> None:
        self.calls, self.period = 0, period

    def __call__(self, input_ids, scores):
        scores[:, self.calls // self.period % VOCAB] += 3.0
        self.calls += 1
        return scores

    def copy(self):
        return copy.copy(self)


class Matcher:
    """As grammar libraries' processors are: every call but the first takes the last token in, and insists on it."""

    def __init__(self) -> None:
        self.started, self.state, self.allowed = False, 0, set(range(VOCAB))

    def __call__(self, input_ids, scores):
        if self.started:
            token = int(input_ids[0, -1])
            assert token in self.allowed
            self.state = (3 * self.state + token) % VOCAB
        self.started = True
        self.allowed = {(self.state + i) % VOCAB for i in range(4)}
        banned = [token for token in range(VOCAB) if token not in self.allowed]
        scores[:, banned] = -math.inf
        return scores


class CopyingMatcher(Matcher):
    def copy(self):
        return copy.copy(self)


class Late:
    """A function of its arguments for a while."""

    def __init__(self, last: int) -> None:
        self.calls, self.last = 0, last

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores if self.calls < self.last else scores.flip(-1)


def engine(drafter, gamma: int = 4) -> Engine:
    return Engine(TableModel(VOCAB), drafter, Fixed(gamma), max_batch_size=4, max_model_len=512)


def ask(params: SamplingParams, *processors, seed: int = 3, **kw) -> Ask:
    with_processors = SamplingParams(**{f: getattr(params, f) for f in params.__slots__} | {"processors": processors})
    return Ask([1, 2], with_processors, seed=seed, **kw)


def once_a_token(params: SamplingParams, make) -> list[int]:
    """Plain decoding, which asks a bare processor once for each token of the text."""
    (request,) = play(engine(NoDrafter()), [ask(params, make())])
    assert request.error is None and request.num_output == 40
    return request.token_ids


def drafters(texts: dict[int, list[int]]):
    yield Oracle(texts)
    yield Wrong(texts, VOCAB)
    yield RandomDrafter(VOCAB)
    yield ModelDrafter(TableModel(VOCAB, seed=1), VOCAB)


@pytest.mark.parametrize("params", SETTINGS)
@pytest.mark.parametrize("make", [Counter, CopyingMatcher])
def test_a_declared_state_follows_the_text_and_not_the_drafts(make, params):
    truth = once_a_token(params, make)
    for drafter in drafters({3: truth}):
        asks = [ask(params, Stateful(make), num_draft_tokens=gamma) for gamma in (1, 3, 7)]
        requests = play(engine(drafter), asks)
        assert [request.token_ids for request in requests] == [truth] * 3, drafter.name
        assert all(request.stats.drafted for request in requests)


def forgets_to_go_back(self, tokens, *, ended):
    self.ahead = self.ahead[-1:]


def goes_back_too_far(self, tokens, *, ended):
    self.ahead = self.ahead[:1]


@pytest.mark.parametrize("planted", [forgets_to_go_back, goes_back_too_far])
def test_planted_bug_a_state_that_is_not_rolled_back_is_found(planted, monkeypatch):
    truth = once_a_token(SETTINGS[1], Counter)
    monkeypatch.setattr(steering.Steering, "commit", planted)
    (request,) = play(engine(Wrong({3: truth}, VOCAB)), [ask(SETTINGS[1], Stateful(Counter))])
    assert request.token_ids != truth


@pytest.mark.parametrize("params", SETTINGS)
def test_without_a_copy_the_text_is_decoded_without_drafts_and_a_warning_says_so(params):
    truth = once_a_token(params, Matcher)
    with pytest.warns(RuntimeWarning, match="Stateful processor without copy"):
        (request,) = play(engine(Wrong({3: truth}, VOCAB)), [ask(params, Stateful(Matcher))])
    assert request.token_ids == truth
    assert request.stats.drafted == 0


@pytest.mark.parametrize("make", [Counter, Matcher, lambda: Late(2)])
def test_a_hidden_state_is_an_error_before_any_token(make):
    (request,) = play(engine(RandomDrafter(VOCAB)), [ask(SETTINGS[0], make())])
    assert isinstance(request.error, ExactnessError)
    assert "keeps a state" in str(request.error)


@pytest.mark.parametrize("last", [5, 20, 90])
def test_a_state_that_shows_late_is_found_before_the_text_is_handed_over(last):
    (request,) = play(engine(RandomDrafter(VOCAB)), [ask(SETTINGS[0], Late(last))])
    assert isinstance(request.error, ExactnessError)
    assert request.finish_reason == "error"


def test_without_drafts_nothing_is_asked_of_a_processor():
    for drafter, gamma in ((NoDrafter(), None), (RandomDrafter(VOCAB), 0)):
        counter = Counter()
        (request,) = play(engine(drafter), [ask(SETTINGS[0], counter, num_draft_tokens=gamma)])
        assert request.error is None
        assert counter.calls == 40


def test_an_assertion_in_a_processor_names_it():
    used = Matcher()
    (first,) = play(engine(NoDrafter()), [ask(SETTINGS[0], used, num_draft_tokens=0)])
    assert first.error is None
    other = next(token for token in range(VOCAB) if token not in used.allowed)
    (second,) = play(engine(NoDrafter()), [Ask([other], SamplingParams(processors=(used,)), num_draft_tokens=0)])
    error = second.error
    assert isinstance(error, RequestError) and isinstance(error.__cause__, AssertionError)
    assert "processor Matcher failed an assertion" in str(error) and "Stateful" in str(error)


def test_spot_checks_are_few():
    class Pure:
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            return scores

    pure, params = Pure(), SamplingParams(max_new_tokens=400)
    drafter = Wrong({3: once_long()}, VOCAB)
    (request,) = play(engine(drafter), [ask(params, pure)])
    s = request.stats
    assert request.error is None and request.num_output == 400
    assert pure.calls - (s.target_passes + s.drafted) <= 2 * (s.target_passes // steering.CHECK_EVERY + 6)


def once_long() -> list[int]:
    (request,) = play(engine(NoDrafter()), [Ask([1, 2], SamplingParams(max_new_tokens=400), seed=3)])
    return request.token_ids


def test_every_request_has_a_processor_of_its_own():
    made = Stateful(Counter)
    requests = [new_request(ask(SETTINGS[0], made)) for _ in range(2)]
    assert requests[0].steering.ahead[0][0] is not requests[1].steering.ahead[0][0]


def test_known_kinds_are_refused_by_name():
    mark = SynthIDTextWatermarkLogitsProcessor(2, [1, 2], 16, 0, 4, device=torch.device("cpu"))
    with pytest.raises(RequestError, match=r"SynthIDTextWatermarkLogitsProcessor keeps a state.*Stateful"):
        SamplingParams(processors=(mark,))


class OnlySome:
    """A constraint that allows the same tokens everywhere."""

    def __init__(self, tokens: set[int], vocab_size: int) -> None:
        self.row = np.packbits([token in tokens for token in range(vocab_size)], bitorder="little").tobytes()

    def allowed_after(self, paths):
        return [self.row for _ in paths]

    def commit(self, tokens):
        pass


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 9, 4097])
def test_a_constraint_leaves_what_it_allows_as_it_is(vocab_size):
    scores = torch.randn(3, vocab_size)
    scores[0, 0], scores[1, -1], scores[2, 0] = -0.0, torch.inf, -torch.inf
    before = scores.clone()
    allowed = {token for token in range(vocab_size) if token % 3 == 0}
    found = Steering(constraint=OnlySome(allowed, vocab_size)).apply(scores, (), [(), (), ()])
    for token in range(vocab_size):
        wanted = before[:, token] if token in allowed else torch.full((3,), -torch.inf)
        assert found[:, token].view(torch.int32).equal(wanted.view(torch.int32))
    assert scores.equal(before)


def test_what_cannot_make_a_processor_is_refused():
    with pytest.raises(RequestError, match=r"Stateful\(5\) is not usable; give a function"):
        Stateful(5)
