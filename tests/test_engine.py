"""The engine's promises that are not about bits: where texts end, what is counted, who is affected by a failure."""

import math
from contextlib import contextmanager
from random import Random

import pytest
import torch
from fakes import Ask, Oracle, RandomDrafter, Scripted, TableModel, Wrong, new_request, play
from models import runtimes, tiny
from transformers import LogitsProcessor

from foredraft.drafters.base import NoDrafter
from foredraft.drafters.model import ModelDrafter
from foredraft.drafters.ngram import NgramDrafter
from foredraft.engine import Engine
from foredraft.errors import CacheMemoryError, ExactnessError, NumericsError, RequestError, VocabularyMismatchError
from foredraft.models.load import LoadOptions, load_target
from foredraft.policy import Fixed
from foredraft.scheduler import PREFILL_CHUNK
from foredraft.types import Draft, Phase, Request, SamplingParams

VOCAB = 8
GREEDY = SamplingParams(max_new_tokens=24)


def engine(drafter=None, *, model=None, gamma: int = 6, batch: int = 4, max_model_len: int = 400) -> Engine:
    made = model or TableModel(VOCAB)
    return Engine(made, drafter or NoDrafter(), Fixed(gamma), max_batch_size=batch, max_model_len=max_model_len)


def plain(ask: Ask, **options) -> Request:
    (alone,) = play(engine(**options), [ask])
    return alone


def oracle(*asks: Ask, new_tokens: int = 60) -> Oracle:
    """Knows each text far beyond its end, whatever ends it."""
    endless = {}
    for ask in asks:
        params = SamplingParams(temperature=ask.params.temperature, max_new_tokens=new_tokens)
        endless[ask.seed] = plain(Ask(ask.prompt, params, ask.seed)).token_ids
    return Oracle(endless)


def first_seen(tokens: list[int], after: int) -> tuple[int, int]:
    """A token that occurs for the first time at or after an index, and where."""
    return next((t, i) for i, t in enumerate(tokens) if i >= after and t not in tokens[:i])


# Ends


@pytest.mark.parametrize("limit", [1, 2, 5, 7, 8, 13])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_max_new_tokens_is_exact_inside_a_block(limit, temperature):
    ask = Ask([1, 2], SamplingParams(temperature=temperature, max_new_tokens=limit), seed=3)
    (request,) = play(engine(oracle(ask)), [ask])
    assert request.token_ids == plain(ask).token_ids
    assert (request.num_output, request.finish_reason) == (limit, "length")
    assert request.stats.output_tokens == len(request.from_draft) == limit
    assert request.stats.drafted == request.stats.accepted == sum(request.from_draft)


@pytest.mark.parametrize("limit", [3, 4, 9, 10, 17])
def test_max_model_len_is_exact_inside_a_block(limit):
    ask = Ask([1, 2], SamplingParams(max_new_tokens=60))
    (request,) = play(engine(oracle(ask), max_model_len=limit), [ask])
    assert (len(request.token_ids), request.finish_reason) == (limit, "length")
    assert request.token_ids == plain(ask, max_model_len=limit).token_ids
    assert request.stats.drafted == request.stats.accepted


@pytest.mark.parametrize("batch", [1, 3])
def test_a_stop_token_inside_a_block_ends_everything(batch):
    endless = plain(Ask([1, 2], SamplingParams(max_new_tokens=40))).output_ids
    stop, where = first_seen(endless, 2)
    ask = Ask([1, 2], SamplingParams(max_new_tokens=40), stop_token_ids=frozenset({stop}))
    mates = [Ask([3, 4 + i], GREEDY, seed=i + 1) for i in range(batch - 1)]
    request, *others = play(engine(oracle(ask, *mates), gamma=8), [ask, *mates])
    assert request.output_ids == endless[: where + 1]
    assert request.finish_reason == "stop"
    assert request.stats.output_tokens == where + 1 == len(request.from_draft)
    assert request.stats.drafted == request.stats.accepted == sum(request.from_draft)  # what came after: not counted
    assert sum(request.stats.accepted_at) == request.stats.accepted
    assert all(other.num_output == 24 for other in others)


def test_a_stop_token_as_bonus_and_as_recovered_token():
    endless = plain(Ask([1, 2], SamplingParams(max_new_tokens=40))).output_ids
    stop, where = first_seen(endless, 2)
    ask = Ask([1, 2], SamplingParams(max_new_tokens=40), stop_token_ids=frozenset({stop}))
    texts = oracle(ask).texts
    for gamma in range(1, 9):
        for made in (Oracle(texts), Wrong(texts, VOCAB), RandomDrafter(VOCAB)):
            (request,) = play(engine(made, gamma=gamma), [ask])
            assert request.output_ids == endless[: where + 1]


def test_a_stop_rule_is_called_once_for_each_token_in_order():
    seen: list[int] = []
    ask = Ask([1, 2], GREEDY)
    made = engine(oracle(ask))
    request = new_request(ask, stop_rule=lambda token: seen.append(token) or len(seen) == 11)
    made.add(request)
    while made.has_work:
        made.step()
    assert seen == request.output_ids == plain(ask).output_ids[:11]
    assert request.finish_reason == "stop"


def test_stop_wins_over_length_on_the_same_token():
    endless = plain(Ask([1, 2], GREEDY)).output_ids
    stop, where = first_seen(endless, 1)
    ask = Ask([1, 2], SamplingParams(max_new_tokens=where + 1), stop_token_ids=frozenset({stop}))
    assert plain(ask).finish_reason == "stop"


def test_nothing_after_the_end_reaches_the_user():
    ask = Ask([1, 2], SamplingParams(max_new_tokens=5))
    made = engine(oracle(ask), gamma=8)
    made.add(new_request(ask))
    outputs = []
    while made.has_work:
        outputs += made.step()
    assert [t for o in outputs for t in o.token_ids] == plain(ask).output_ids
    assert [o.finish_reason for o in outputs][:-1] == [None] * (len(outputs) - 1)
    assert made.step() == []


# Counts


@pytest.mark.parametrize("name", ["none", "ngram", "model", "oracle", "wrong", "random"])
@pytest.mark.parametrize("verifier", ["greedy", "coupled", "rejection"])
def test_counters_add_up(name, verifier):
    temperature = 0.0 if verifier == "greedy" else 1.0
    chosen = "coupled" if verifier == "greedy" else verifier
    params = SamplingParams(temperature=temperature, max_new_tokens=31, verifier=chosen)
    asks = [Ask([1, 2, 3 + i], params, seed=i) for i in range(5)]
    texts = oracle(*asks).texts
    makers = {
        "none": NoDrafter,
        "ngram": lambda: NgramDrafter(min_match=1),
        "model": lambda: ModelDrafter(TableModel(VOCAB, seed=1), VOCAB),
        "oracle": lambda: Oracle(texts),
        "wrong": lambda: Wrong(texts, VOCAB),
        "random": lambda: RandomDrafter(VOCAB),
    }
    made = engine(makers[name](), gamma=4, batch=3)
    for request in play(made, asks):
        s = request.stats
        ended_in_draft = request.from_draft[-1]
        assert s.output_tokens == request.num_output == len(request.from_draft) == 31
        assert s.accepted == sum(request.from_draft) <= s.drafted
        assert s.output_tokens == s.accepted + s.target_passes - ended_in_draft  # one recovered or bonus token a pass
        assert (sum(s.drafted_at), sum(s.accepted_at)) == (s.drafted, s.accepted)
        assert s.drafts == (s.drafted_at[0] if s.drafted_at else 0)
        assert s.accepted_at == sorted(s.accepted_at, reverse=True)
        assert s.prompt_tokens == 3
        assert s.seconds_total >= s.seconds_to_first_token > 0
    assert made.stats.output_tokens == 5 * 31
    assert made.stats.prompt_tokens == 15


def seconds(stats) -> tuple[float, ...]:
    return stats.seconds_drafting, stats.seconds_verifying, stats.seconds_other


def test_totals_hold_the_last_step_too():
    made = engine(RandomDrafter(VOCAB))
    requests = play(made, [Ask([1, 2, i], SamplingParams(max_new_tokens=1 + 4 * i), seed=i) for i in range(3)])
    totals = [sum(values) for values in zip(*(seconds(request.stats) for request in requests), strict=True)]
    assert seconds(made.stats) == pytest.approx(totals)
    assert all(value > 0 for request in requests for value in seconds(request.stats))


def test_every_chunk_of_a_prompt_counts_as_its_verifying():
    made = engine()
    request = new_request(Ask([1] * (2 * PREFILL_CHUNK + 9), SamplingParams(max_new_tokens=1)))
    made.add(request)
    counted = []
    while made.has_work:
        made.step()
        counted.append(request.stats.seconds_verifying)
    assert len(counted) == 3 and 0 < counted[0] < counted[1] < counted[2]


def test_drafter_and_policy_change_between_requests_only():
    ask = Ask([1, 2], GREEDY)
    made = engine(RandomDrafter(VOCAB))
    before = made.drafter, made.policy
    with made.using(oracle(ask), Fixed(3)):
        (request,) = play(made, [ask])
    assert (made.drafter, made.policy) == before
    assert (request.stats.draft_acceptance_rate, len(request.stats.drafted_at)) == (1.0, 3)
    made.add(new_request(ask))
    with pytest.raises(RequestError, match="requests run"):
        made.use(NoDrafter())


def test_every_token_says_whether_it_was_drafted():
    ask = Ask([1, 2], GREEDY)
    (request,) = play(engine(Wrong(oracle(ask).texts, VOCAB), gamma=3), [ask])
    flags = [False]  # the prompt's own pass drafts nothing
    while len(flags) < request.num_output:
        right = (len(ask.prompt) + len(flags)) % 3  # what `Wrong` gets right before it is wrong
        flags += [True] * min(right, request.num_output - len(flags) - 1) + [False]
    assert request.from_draft == flags and any(flags)


# Probabilities and processors


@pytest.fixture(scope="module", params=runtimes())
def llama(request):
    return load_target(tiny("llama"), LoadOptions("float32", "cpu", runtime=request.param))


@contextmanager
def no_number(model, token):
    """While it lasts the model computes nothing from this token."""
    row = model.embedding[token].clone()
    model.embedding[token] = math.nan
    try:
        yield
    finally:
        model.embedding[token] = row


@pytest.mark.parametrize("gamma", [0, 1, 4, 8])
def test_logprobs_are_those_of_a_plain_recomputation(llama, gamma):
    ask = Ask([5, 6, 7, 8], SamplingParams(temperature=0.8, top_k=9, max_new_tokens=20, logprobs=3), seed=1)
    draft = ModelDrafter(load_target(tiny("llama"), LoadOptions("float32", "cpu")), llama.vocab_size)
    (request,) = play(engine(draft, model=llama, gamma=gamma), [ask])
    with torch.inference_mode():
        logits = tiny("llama")(input_ids=torch.tensor([request.token_ids])).logits[0, 3:-1]
    logs = logits.log_softmax(-1)
    assert (request.stats.accepted > 0) == (gamma > 0)
    assert [found.token for found in request.logprobs] == request.output_ids
    for found, row in zip(request.logprobs, logs, strict=True):
        assert found.logprob == pytest.approx(float(row[found.token]), abs=1e-3)
        assert [value for _, value in found.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


def test_logprobs_stop_where_the_text_stops():
    ask = Ask([1, 2], SamplingParams(max_new_tokens=5, logprobs=0))
    (request,) = play(engine(oracle(ask), gamma=8), [ask])
    assert len(request.logprobs) == 5
    assert all(found.top == () and found.logprob < 0 for found in request.logprobs)


class Witness(LogitsProcessor):
    """Writes in place, as many do, and remembers for which prefixes it was asked."""

    def __init__(self) -> None:
        self.prefixes: list[tuple[int, ...]] = []

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0] == 1
        self.prefixes.append(tuple(input_ids[0].tolist()))
        scores[:, input_ids[0, -1]] -= 1.0
        scores[:, 0] += 0.5 * math.sin(input_ids.shape[1])
        return scores


@pytest.mark.parametrize("name", ["oracle", "wrong", "random", "model"])
def test_a_custom_processor_sees_the_true_prefix_of_every_position(name):
    def ask(witness: Witness) -> Ask:
        return Ask([1, 2], SamplingParams(temperature=0.9, max_new_tokens=20, processors=(witness,)), seed=2)

    undrafted = Witness()
    truth = plain(ask(undrafted)).token_ids
    assert undrafted.prefixes == [tuple(truth[:i]) for i in range(2, len(truth))]
    witness = Witness()
    texts = {2: truth}
    makers = {
        "oracle": lambda: Oracle(texts),
        "wrong": lambda: Wrong(texts, VOCAB),
        "random": lambda: RandomDrafter(VOCAB),
        "model": lambda: ModelDrafter(TableModel(VOCAB, seed=1), VOCAB),
    }
    (request,) = play(engine(makers[name](), gamma=5), [ask(witness)])
    assert request.token_ids == truth
    assert set(undrafted.prefixes) <= set(witness.prefixes)


# Failures


class Poisoned(TableModel):
    """Gives NaN after one token; everybody else's logits are sound."""

    poison = 7

    def _row(self, slot, position):
        row = super()._row(slot, position)
        return row * math.nan if self.written[slot, position] == self.poison else row


@pytest.mark.parametrize("order", [0, 1, 2])
def test_nan_logits_end_one_request_and_no_other(order):
    params = SamplingParams(max_new_tokens=12, logit_bias={7: -100.0})
    asks = [Ask([1, 2 + i], params, seed=i) for i in range(2)]
    asks.insert(order, Ask([1, 7], params, seed=9))
    model = Poisoned(VOCAB)
    cleared: list[tuple[int, int]] = []
    model.cache.clear = lambda slot, start=0: cleared.append((slot, start))
    made = engine(model=model)
    requests = play(made, asks)
    broken = requests.pop(order)
    assert isinstance(broken.error, NumericsError) and "nan" in str(broken.error)
    assert (broken.finish_reason, broken.num_output, cleared) == ("error", 0, [(order, 0)])
    assert [request.token_ids for request in requests] == [plain(a).token_ids for a in asks if a.seed != 9]
    assert not made.has_work and len(made.scheduler.free_slots) == 4


class Sevens(Scripted):
    def tokens(self, request):
        return [7] * 3


@pytest.mark.parametrize("temperature, verifier", [(0.0, "coupled"), (1.0, "coupled"), (1.0, "rejection")])
def test_nan_after_a_token_that_is_never_reached_hurts_nobody(temperature, verifier):
    """A drafted token may break the model; what plain decoding never computes must not end a request."""
    params = SamplingParams(temperature=temperature, max_new_tokens=12, logit_bias={7: -100.0}, verifier=verifier)
    (request,) = play(engine(Sevens(), model=Poisoned(VOCAB)), [Ask([1, 2], params, seed=5)])
    assert request.error is None
    assert request.num_output == 12
    assert request.stats.accepted == 0 < request.stats.drafted


def test_a_processor_that_masks_everything_after_a_refused_draft_hurts_nobody():
    class Grammar(LogitsProcessor):
        """Forbids 7, and knows no way on from there."""

        def __call__(self, input_ids, scores):
            scores[:, 7] = -math.inf
            return scores.fill_(-math.inf) if 7 in input_ids else scores

    ask = Ask([1, 2], SamplingParams(temperature=1.0, max_new_tokens=12, processors=(Grammar(),)), seed=5)
    (request,) = play(engine(Sevens()), [ask])
    assert request.error is None
    assert request.token_ids == plain(ask).token_ids


def test_a_processor_that_raises_where_plain_decoding_never_comes_hurts_nobody():
    class Strict(LogitsProcessor):
        """Never says 7, and raises on a text that does."""

        def __call__(self, input_ids, scores):
            if 7 in input_ids:
                raise KeyError(7)
            scores[:, 7] = -math.inf
            return scores

    ask = Ask([1, 2], SamplingParams(temperature=1.0, max_new_tokens=12, processors=(Strict(),)), seed=5)
    (request,) = play(engine(Sevens()), [ask])
    assert request.error is None
    assert request.token_ids == plain(ask).token_ids


def test_a_processor_that_fails_on_a_guess_only_ends_the_draft(llama):
    """The drafter asks the request's processors too, on texts that the target may never agree to."""

    class Counts(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 9:
                raise KeyError("nine")
            return scores

    asks = [Ask([1, 2], SamplingParams(max_new_tokens=20, processors=(Counts(),))), Ask([1, 3], GREEDY, seed=1)]
    drafter = ModelDrafter(load_target(tiny("llama"), LoadOptions()), llama.vocab_size)
    broken, sound = play(engine(drafter, model=llama), asks)
    assert isinstance(broken.error, KeyError)
    assert broken.num_output == 8
    assert sound.token_ids == plain(asks[1], model=llama).token_ids


def test_a_draft_model_that_overflows_leaves_plain_decoding(llama):
    """It says so, drafts no more for that text, and serves the next one that gets its slot."""
    draft = load_target(tiny("llama", seed=1), LoadOptions())
    asks = [Ask([1, 2, 3], GREEDY), Ask([1, 3], GREEDY, seed=1)]
    drafter = ModelDrafter(draft, llama.vocab_size)
    noticed = pytest.warns(RuntimeWarning, match=r"'model' gave logits that are no numbers after \d+ tokens")
    with no_number(draft, 3), noticed:
        (first,) = play(engine(drafter, model=llama, batch=1), asks[:1])
    (second,) = play(engine(drafter, model=llama, batch=1), asks[1:])
    assert first.error is None
    assert (first.stats.drafted, second.stats.drafted > 0) == (0, True)
    assert [first.token_ids, second.token_ids] == [plain(ask, model=llama).token_ids for ask in asks]


@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_a_guess_that_the_target_cannot_compute_hurts_nobody(llama, gamma):
    """A drafter changes when tokens arrive, never which, though its guesses may not be numbers to the target."""
    asks = [Ask([1, 2, 4], SamplingParams(max_new_tokens=24, logit_bias={7: -100.0})), Ask([1, 2, 3], GREEDY, seed=1)]
    wanted = [plain(ask, model=llama).token_ids for ask in asks]
    with no_number(llama, 7):
        with pytest.warns(RuntimeWarning, match="made the target's logits no numbers"):
            first, second = play(engine(Sevens(), gamma=gamma, model=llama), asks)
    assert [request.num_draft_tokens for request in (first, second)] == [None, None]  # the user's; not a flag of ours
    assert (first.error, second.error) == (None, None)
    assert first.token_ids == wanted[0]
    assert second.token_ids == wanted[1]


def test_a_spoilt_guess_is_reported_where_the_text_ends_with_the_next_token(llama):
    first, second = plain(Ask([1, 2, 3], GREEDY), model=llama).output_ids[:2]
    assert first != second
    ask = Ask([1, 2, 3], GREEDY, stop_token_ids=frozenset({second}))
    with no_number(llama, 7):
        with pytest.warns(RuntimeWarning, match="made the target's logits no numbers after 4 tokens"):
            (text,) = play(engine(Sevens(), gamma=1, model=llama), [ask])
    assert (text.output_ids, text.finish_reason) == ([first, second], "stop")


def test_a_drafter_is_not_blamed_for_what_plain_decoding_meets_too():
    """The warning would be an error here, as it is for whoever runs with -W error."""

    class Masks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores - torch.inf if input_ids.shape[1] > 9 else scores

    ask = Ask([1, 2], SamplingParams(max_new_tokens=20, processors=(Masks(),)))
    (drafted,) = play(engine(RandomDrafter(VOCAB)), [ask])
    assert isinstance(drafted.error, NumericsError)
    assert drafted.token_ids == plain(ask).token_ids


def test_a_token_that_is_no_number_hurts_no_text_without_it(llama):
    """Not even as padding."""
    wanted = plain(Ask([1, 2, 3], GREEDY), model=llama).token_ids
    assert 0 not in wanted
    with no_number(llama, 0):
        assert plain(Ask([1, 2, 3], GREEDY), model=llama).token_ids == wanted


def test_a_slot_that_held_nan_serves_again(llama):
    asks = [Ask([1, 2, 7], GREEDY), Ask([1, 2, 3], GREEDY)]
    with no_number(llama, 7):
        broken, sound = play(engine(model=llama, batch=1), asks)
    assert isinstance(broken.error, NumericsError)
    assert broken.slot == sound.slot
    assert sound.token_ids == plain(asks[1], model=llama).token_ids


def test_a_processor_that_fails_ends_its_own_request():
    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 6:
                raise KeyError("six")
            return scores

    asks = [Ask([1, 2], SamplingParams(max_new_tokens=10, processors=(Fails(),))), Ask([1, 3], GREEDY, seed=1)]
    broken, sound = play(engine(), asks)
    assert isinstance(broken.error, KeyError)
    assert broken.num_output == 5
    assert sound.token_ids == plain(asks[1]).token_ids


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_processor_with_weights_that_learn_is_welcome(temperature):
    class Learned(LogitsProcessor):
        def __init__(self, bias):
            self.bias = bias

        def __call__(self, input_ids, scores):
            return scores + self.bias

    bias = torch.linspace(-2, 2, VOCAB)
    asks = [
        Ask([1, 2], SamplingParams(max_new_tokens=10, temperature=temperature, processors=(Learned(b),)))
        for b in (bias, torch.nn.Parameter(bias))
    ]
    fixed, learned = play(engine(), asks)
    assert learned.error is None
    assert learned.token_ids == fixed.token_ids


def test_out_of_memory_names_the_bytes_and_the_remedy(llama, monkeypatch):
    made = engine(model=llama)
    lost = new_request(Ask([1, 2, 3], GREEDY))
    made.add(lost)
    llama.cache.release()

    def full(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", full)
        patch.setattr(torch, "empty", full)
        made.step()
    with pytest.raises(CacheMemoryError, match=r"[\d.]+ GiB.*lower max_model_len or max_batch_size"):
        raise lost.error
    assert not made.has_work and len(made.scheduler.free_slots) == 4
    (sound,) = play(made, [Ask([1, 2, 3], GREEDY)])  # the memory came back
    assert sound.token_ids == plain(Ask([1, 2, 3], GREEDY), model=llama).token_ids


def test_a_policy_hears_which_steps_also_read_prompts():
    seen = []

    class Watching(Fixed):
        def observe_times(self, times):
            seen.append(times)

    made = Engine(TableModel(VOCAB), RandomDrafter(VOCAB), Watching(0), max_batch_size=4, max_model_len=400)
    play(made, [Ask([1] * 60, GREEDY), Ask([2] * 90, GREEDY, seed=1, arrives=5)])
    assert [times.read for times in seen if times.read] == [59, 89]
    assert max(times.rows for times in seen if not times.read) == 2 * made.target.row_invariance.min_rows


@pytest.mark.parametrize(("drafter", "gamma"), [(NoDrafter(), 4), (RandomDrafter(VOCAB), 0), (RandomDrafter(VOCAB), 4)])
def test_a_policy_hears_nothing_where_nothing_was_asked(drafter, gamma):
    heard = []

    class Watching(Fixed):
        def observe(self, request, draft, verdict):
            heard.append("draft")

        def observe_times(self, times):
            heard.append("times")

    made = Engine(TableModel(VOCAB), drafter, Watching(gamma), max_batch_size=1, max_model_len=400)
    play(made, [Ask([1, 2], GREEDY)])
    told = {"draft", "times"} if gamma else {"times"}
    assert set(heard) == (set() if type(drafter) is NoDrafter else told)


@pytest.mark.parametrize("what", ["forward", "propose", "start", "observe_times"])
def test_a_step_that_fails_ends_those_that_took_part_and_frees_what_they_held(what, monkeypatch):
    drafter = RandomDrafter(VOCAB)
    made = engine(drafter, batch=2)
    owner = {"forward": made.target, "propose": drafter}.get(what, made.policy)
    requests = [new_request(Ask([1, 2, i], GREEDY, seed=i)) for i in range(3)]
    for request in requests:
        made.add(request)
    made.step()

    def fails(*args):
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(owner, what, fails)
        outputs = made.step()
    assert [(output.request, output.finish_reason) for output in outputs] == [(r, "error") for r in requests[:2]]
    assert all(isinstance(request.error, OSError) for request in requests[:2])
    while made.has_work:
        made.step()
    assert requests[2].token_ids == plain(Ask([1, 2, 2], GREEDY, seed=2)).token_ids
    assert made.scheduler.free_slots == [0, 1]


def refusal(draft: Draft) -> Exception:
    """The error of a request for which this was proposed; another in the same step must not notice."""

    class Proposes(Scripted):
        def propose(self, requests, policy):
            return [draft if request.seed == 0 else Draft() for request in requests]

    broken, sound = play(engine(Proposes(), gamma=3), [Ask([1], GREEDY), Ask([1, 2], GREEDY, seed=1)])
    assert (broken.finish_reason, broken.num_output) == ("error", 0)
    assert sound.token_ids == plain(Ask([1, 2], GREEDY, seed=1)).token_ids
    return broken.error


def test_a_tree_is_refused():
    with pytest.raises(ExactnessError, match="proposed a tree"):
        raise refusal(Draft((1, 2), "forest", parents=(-1, -1)))


def test_a_draft_beyond_its_limit_is_refused():
    with pytest.raises(ExactnessError, match=r"'eager' proposed 4 tokens where 3 were allowed"):
        raise refusal(Draft((1, 2, 3, 4), "eager"))


@pytest.mark.parametrize("token", [-1, 8, 10**9])
def test_a_draft_outside_the_vocabulary_is_refused(token):
    with pytest.raises(VocabularyMismatchError, match=rf"'foreign' proposed token {token}.*8 tokens"):
        raise refusal(Draft((1, token), "foreign"))


# Scheduling


def test_slots_are_reused_and_waiting_requests_admitted_in_order():
    made = engine(RandomDrafter(VOCAB), batch=2)
    asks = [Ask([1, 2, i], SamplingParams(max_new_tokens=3 + 2 * i), seed=i) for i in range(6)]
    requests = [new_request(ask) for ask in asks]
    started: list[Request] = []
    for request in requests:
        made.add(request)
    while made.has_work:
        made.step()
        assert len(made.scheduler.running) <= 2
        started += [r for r in requests if r.phase is not Phase.WAITING and r not in started]
    assert started == requests
    assert {request.slot for request in requests} == {0, 1}
    assert [request.token_ids for request in requests] == [plain(ask).token_ids for ask in asks]


def test_abort_while_waiting_running_and_after_the_end():
    made = engine(batch=1)
    running, waiting, last = (new_request(Ask([1, 2, i], GREEDY, seed=i)) for i in range(3))
    for request in (running, waiting, last):
        made.add(request)
    made.step()
    made.abort(waiting)
    made.abort(running)
    assert (running.num_output, waiting.num_output) == (1, 0)
    assert running.finish_reason == waiting.finish_reason == "abort"
    while made.has_work:
        made.step()
    assert last.token_ids == plain(Ask([1, 2, 2], GREEDY, seed=2)).token_ids
    made.abort(last)
    assert last.finish_reason == "length"
    assert made.stats.output_tokens == 25


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 300])
def test_prefill_is_cut_alike_whoever_else_is_there(length):
    """Chunks begin at multiples of a fixed size; a mate's prompt may not move them."""
    source = Random(length)
    prompt = [source.randrange(VOCAB) for _ in range(length)]
    mates = [Ask([source.randrange(VOCAB) for _ in range(n)], GREEDY, seed=n) for n in (1, 70, 290)]
    chunks = {}
    for crowd in ([], mates):
        made = engine()
        seen: list[tuple[int, int]] = []
        request = new_request(Ask(prompt, GREEDY))
        for ask in crowd:
            made.add(new_request(ask))
        made.add(request)
        while request.cached < length:
            before = request.cached
            made.step()
            if request.cached > before:  # it may have to wait for its turn
                seen.append((before, min(request.cached, length)))
        chunks[len(crowd)] = seen
    assert chunks[0] == chunks[3]
    assert all(start % PREFILL_CHUNK == 0 or end - start == 1 for start, end in chunks[0])
    assert all(end - start <= PREFILL_CHUNK for start, end in chunks[0])


def test_prompts_are_computed_within_a_budget_in_the_order_of_arrival():
    """Eight newcomers must not make one pass of 2,048 rows while somebody decodes."""
    source = Random(0)
    made = engine(batch=10)
    decoding = new_request(Ask([1, 2], SamplingParams(max_new_tokens=40)))
    made.add(decoding)
    made.step()
    asks = [Ask([source.randrange(VOCAB) for _ in range(300)], SamplingParams(max_new_tokens=2)) for _ in range(8)]
    newcomers = [new_request(ask) for ask in asks]
    for request in newcomers:
        made.add(request)
    widest = len(made.target.passes)
    while any(request.cached < 300 for request in newcomers):
        before = decoding.num_output
        made.step()
        assert decoding.num_output == before + 1
        behind = [request.cached for request in newcomers if request.phase is Phase.RUNNING]
        assert behind == sorted(behind, reverse=True)
    assert max(made.target.passes[widest:]) <= 2 * PREFILL_CHUNK + 4 * 10
    assert [request.token_ids[:301] for request in newcomers] == [plain(ask).token_ids[:301] for ask in asks]


def test_a_chunk_larger_than_the_budget_runs_alone():
    made = engine()
    made.scheduler.prefill_budget = 1
    requests = play(made, [Ask([1 + i] * 40, GREEDY, seed=i) for i in range(3)])
    assert [request.num_output for request in requests] == [24] * 3


def test_drafting_per_request():
    """`num_draft_tokens` of a request is what it gets, 0 is plain decoding, None the policy's choice."""
    asks = [Ask([1, 2], GREEDY, seed=i, num_draft_tokens=gamma) for i, gamma in enumerate((0, 1, 5, None))]
    requests = play(engine(oracle(*asks), gamma=3), asks)
    assert [len(request.stats.drafted_at) for request in requests] == [0, 1, 5, 3]
    assert len({tuple(request.token_ids) for request in requests}) == 1
