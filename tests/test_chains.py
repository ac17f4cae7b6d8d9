"""Whole chains drawn in the native library: the drafts that asking after each token gives, and nothing else."""

import math
from collections import defaultdict
from random import Random
from typing import cast

import pytest
import torch
from models import VOCAB, biased, draws, tiny

from foredraft import LLM, SamplingParams, noise, sampling
from foredraft.drafters.model import ModelDrafter
from foredraft.models.base import Guessing
from foredraft.models.load import LoadOptions, load_model
from foredraft.models.native import NativeModel
from foredraft.models.rows import Span, plan
from foredraft.native import library
from foredraft.native.choosing import Sampler
from foredraft.noise import Stream
from foredraft.policy import DraftPolicy, Fixed, Gain, PerRequest, StepTimes, StopRule
from foredraft.scores import adjust, restrict
from foredraft.types import Draft, Request, Verdict

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
FAMILY = ("llama", "mistral", "qwen2", "qwen3")
GREEDY, COUPLED, WARM = SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=0.7)
FILTERED = (
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=0.8, top_p=0.7),
    SamplingParams(temperature=1.2, min_p=0.05),
    SamplingParams(temperature=1.0, top_k=20, top_p=0.9, min_p=0.01),
)
MOST = 12


def isas() -> tuple[str, ...]:
    return ("portable",) if library.why_not() else library.load().isas


def native(name: str, dtype: torch.dtype = torch.float32, isa: str | None = None) -> NativeModel:
    model = load_model(biased(tiny(name, dtype)), LoadOptions(runtime="native"))
    return NativeModel(biased(tiny(name, dtype)), library.load(), isa=isa) if isa else cast(NativeModel, model)


class Asking:
    """A policy without its rule, so that it is asked after each token."""

    def __init__(self, policy: DraftPolicy) -> None:
        self.policy = policy

    def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
        return self.policy.go_on(request, confidences)


def texts(params: SamplingParams, count: int, seed: int = 0) -> list[Request]:
    source = Random(seed)
    made = []
    for slot in range(count):
        tokens = draws(source.randint(1, 90), seed + slot)
        made.append(Request(tokens, params, 1000 + slot, lambda token: False, slot=slot))
        made[-1].draft_limit = source.randint(1, MOST)
    return made


def learnt() -> Gain:
    """A policy that stops some chains early and others late."""
    policy = Gain()
    for step in range(40):
        drafted = 4 * (step % 2)
        request = Request([1], GREEDY, 0, lambda token: False)
        confidences = tuple((i + step) % 10 / 10 for i in range(drafted))
        policy.observe(
            request, Draft((1,) * drafted, confidences=confidences), Verdict(tuple(range(step % 5 % 4)), 1, "recovered")
        )
        policy.observe_times(
            StepTimes(3, drafted, 3 + drafted, 3 + drafted // 2, 2e-4 * drafted, 1e-3, 1e-3 + 2e-4 * drafted)
        )
    return policy


def opened(policy: Gain, requests: list[Request]) -> PerRequest:
    for request in requests:
        policy.source.alpha.add(request, 0.9)
        policy.source.open[0] = policy.source.open.get(0, 0) + (request.num_draft_tokens is None)
    return PerRequest(policy)


def both(model: NativeModel, requests: list[Request], make) -> tuple[list[Draft], list[Draft]]:
    """Drafts at once and one by one, each with a drafter and a policy of its own."""
    drafts = []
    for wrap in (lambda policy: policy, Asking):
        model.cache.release()
        drafter, policy = ModelDrafter(model, VOCAB), make()
        own = opened(policy, requests) if isinstance(policy, Gain) else PerRequest(policy)
        drafts.append(drafter.propose(requests, wrap(own)))
    return drafts[0], drafts[1]


@pytest.mark.parametrize("make", [Fixed, learnt], ids=["fixed", "gain"])
@pytest.mark.parametrize("params", [GREEDY, COUPLED, WARM, *FILTERED], ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_a_chain_is_the_draft_that_asking_after_each_token_gives(name, params, make):
    model, lengths = native(name), set()
    for seed in range(6):
        requests = texts(params, 1 + seed % 4, seed)
        requests[0].num_draft_tokens = None if seed % 2 else MOST
        at_once, asked = both(model, requests, make)
        assert [draft.tokens for draft in at_once] == [draft.tokens for draft in asked]
        for mine, theirs in zip(at_once, asked, strict=True):
            assert mine.confidences == pytest.approx(theirs.confidences, rel=1e-4)
            assert mine.probs is None
        lengths |= {len(draft) for draft in at_once}
    assert len(lengths) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", isas())
def test_every_instruction_set_draws_by_the_targets_noise(isa, dtype):
    """50 draws each: the token that `sampling.choose` gives for the same logits, position and seed."""
    model = native("qwen3", dtype, isa)
    tokens = draws(40)
    for params in (GREEDY, WARM, SamplingParams(temperature=1.3), *FILTERED):
        for seed in range(4):
            guessing = Guessing(sampling.sampler(params), noise.fold(seed, Stream.TOKEN), 50)
            ((drawn, confidences),) = model.chain([Span(0, 0, tokens)], [guessing], StopRule([None]), VOCAB)
            whole = tokens + drawn
            logits = model.forward(plan([Span(1, 0, whole[:-1], 50)], 1, 1))
            positions = list(range(40, 90))
            scores = adjust(logits, whole, [()], 0, params)
            assert drawn == sampling.choose(scores, params, seed, positions)
            chances = restrict(scores, params).softmax(-1).gather(1, torch.tensor(drawn)[:, None]).flatten()
            assert torch.tensor(confidences) == pytest.approx(chances, rel=1e-4)


def test_a_chain_ends_where_its_logits_are_no_numbers():
    model = native("llama")
    model.embedding[7] = math.nan
    drafter = ModelDrafter(model, VOCAB)
    request, other = texts(GREEDY, 2)
    request.token_ids.append(7)
    other.draft_limit = 1
    with pytest.warns(RuntimeWarning, match="gave logits that are no numbers"):
        spoilt, fine = drafter.propose([request, other], PerRequest(Fixed()))
    assert spoilt.tokens == () and len(fine) == 1
    assert drafter.propose([request], PerRequest(Fixed()))[0].tokens == ()


def test_a_smaller_vocabulary_of_the_target_bounds_the_guesses():
    model = native("llama")
    ((drawn, _),) = model.chain([Span(0, 0, draws(20))], [Guessing(Sampler(2.0), 5, 60)], StopRule([None]), 9)
    assert len(drawn) == 60 and max(drawn) < 9


@pytest.mark.parametrize("params", [SamplingParams(logit_bias={3: 2.0}), SamplingParams(repetition_penalty=1.2)])
def test_processed_scores_are_drawn_one_by_one(params, monkeypatch):
    model = native("llama")
    monkeypatch.setattr(NativeModel, "chain", lambda *_: pytest.fail("drawn without its processing"))
    drafts = ModelDrafter(model, VOCAB).propose(texts(params, 2), PerRequest(Fixed()))
    assert all(draft.tokens for draft in drafts)


def test_no_token_of_a_text_changes_and_passes_are_saved():
    llm = LLM(tiny("llama"), tiny("llama"), runtime="native", max_batch_size=4, draft_weight_format="none")
    prompts = [draws(20 + seed, seed) for seed in range(4)]
    for params in (SamplingParams(max_new_tokens=40), SamplingParams(max_new_tokens=40, temperature=0.8, seed=3)):
        plain = llm.generate(prompts, params, num_draft_tokens=0)
        drafted = llm.generate(prompts, params, num_draft_tokens=6)
        assert [result.token_ids for result in drafted] == [result.token_ids for result in plain]
        assert all(result.stats.draft_acceptance_rate > 0.9 for result in drafted)


def test_a_policy_that_changes_when_to_go_on_is_asked():
    asked = defaultdict(int)

    class Three(Gain):
        def go_on(self, request: Request, confidences: tuple[float, ...]) -> bool:
            asked[request] += 1
            return len(confidences) < 3

    requests = texts(GREEDY, 2)
    for request in requests:
        request.draft_limit = MOST
    drafts = ModelDrafter(native("llama"), VOCAB).propose(requests, PerRequest(Three()))
    assert [len(draft) for draft in drafts] == [3, 3] and list(asked.values()) == [3, 3]
