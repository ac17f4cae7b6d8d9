"""The drop-in: options of drafting change no token; what its objects do beside generating."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dropin import ARCHITECTURES, NEW, continuation, near, padded, prompts, same, tokenizer
from models import tiny
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
)

import foredraft
from foredraft.errors import ExactnessError, RequestError
from foredraft.integrations.drafting import Assisted, Drafting, IpexPolicy
from foredraft.integrations.transformers import AutoModelForCausalLM, SpeculativeModel
from foredraft.policy import Fixed, Gain


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, None),
        ({"num_assistant_tokens": 4}, Assisted),
        ({"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "heuristic"}, Assisted),
        ({"num_assistant_tokens_schedule": "heuristic_transient"}, Assisted),
        ({"assistant_confidence_threshold": 0.4}, Assisted),
        ({"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}, Assisted),
        ({"lookahead": 3}, Gain),
        ({"num_draft_tokens": 0}, Fixed),
        ({"verifier": "coupled", "num_draft_tokens": 7}, Fixed),
        ({"max_step_draft": 6, "th_stop_draft": 0.6, "auto_th_stop_draft": True}, IpexPolicy),
        ({"auto_parameters": [1, 0.5, 0.9, 1e-2, 0.9], "min_step_draft": 2, "hf_adjust": True}, IpexPolicy),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("sampled", [False, True])
def test_drafting_options_change_no_token(
    llama_fast: SpeculativeModel, options: dict[str, Any], kind: type | None, sampled: bool
) -> None:
    usual = llama_fast.engine.drafter, llama_fast.engine.policy
    asked: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": sampled, "seed": 3}
    expected = llama_fast.generate(prompts(2), **asked)
    assert llama_fast.generate(prompts(2), **asked, **options).tolist() == expected.tolist()
    assert usual == (llama_fast.engine.drafter, llama_fast.engine.policy)
    policy = Drafting.take({**options}).policy(31)
    assert policy is None if kind is None else type(policy) is kind


def test_longest_drafts_are_as_asked(llama_fast: SpeculativeModel) -> None:
    for options in ({"num_assistant_tokens": 3}, {"max_step_draft": 3, "th_stop_draft": 0.0}):
        llama_fast.generate(prompts(), max_new_tokens=NEW, **options)
        assert max(llama_fast.draft_num) == 3


def test_a_confidence_threshold_shortens_drafts(llama_fast: SpeculativeModel) -> None:
    def longest(threshold: float) -> int:
        options = {"num_assistant_tokens": 8, "assistant_confidence_threshold": threshold}
        llama_fast.generate(prompts(), max_new_tokens=NEW, **options)
        return max(llama_fast.draft_num)

    assert longest(1.0) == 1  # the token that fell short is kept
    assert longest(0.0) == 8


def test_an_assistant_is_made_once(llama: PreTrainedModel) -> None:
    plainly = foredraft.accelerate(llama, draft=None)
    assistant = near(llama, 0.01)
    for given in (assistant, assistant, foredraft.accelerate(near(llama), draft=None)):
        same_ids = plainly.generate(prompts(), max_new_tokens=NEW, assistant_model=given, num_assistant_tokens=4)
        assert same_ids.tolist() == llama.generate(prompts(), max_new_tokens=NEW).tolist()
        assert plainly.n_matched > 0
    assert len(plainly._choices._drafters) == 2
    plainly.generate(prompts(), max_new_tokens=NEW)
    assert plainly.n_drafted == 0


def test_prompt_lookup_from_a_configuration(llama: PreTrainedModel) -> None:
    plainly = foredraft.accelerate(llama, draft=None)
    config = GenerationConfig(prompt_lookup_num_tokens=4, max_matching_ngram_size=1, max_new_tokens=NEW)
    ids = prompts().repeat(1, 3)
    expected = llama.generate(ids, max_new_tokens=NEW)
    assert plainly.generate(ids, generation_config=config).tolist() == expected.tolist()
    assert plainly.n_drafted > 0
    assert plainly.generate(ids.repeat(2, 1), generation_config=config)[1].tolist() == expected[0].tolist()


def test_statistics(llama: PreTrainedModel) -> None:
    model = foredraft.accelerate(llama, draft=near(llama), policy="fixed")
    model.generate(prompts(), max_new_tokens=NEW)
    rounds = len(model.generate_time)
    lists = (model.draft_time, model.verify_time, model.draft_num, model.accept_num)
    assert {len(values) for values in lists} == {rounds}
    assert model.n_token_generated == NEW == 1 + sum(model.accept_num)
    assert model.n_drafted == sum(model.draft_num)
    assert (
        model.n_matched == NEW - 1 - rounds or model.n_matched == NEW - rounds
    )  # the last round may lack its own token
    assert model.first_token_time > 0
    assert model.e2e_time_without_first == pytest.approx(sum(model.generate_time))
    assert model.stats.output_tokens == NEW
    model.clear_benchmarks()
    assert (model.n_drafted, model.draft_num, model.first_token_time) == (0, [], 0.0)


def test_an_accelerated_model_is_left_as_it_was(request: pytest.FixtureRequest) -> None:
    for name in (*ARCHITECTURES, "mixtral"):
        model = tiny(name).train()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        kinds = [type(module) for module in model.modules()]
        attention = model.config._attn_implementation
        fast = foredraft.accelerate(model, draft="ngram")
        fast.generate(prompts(), max_new_tokens=8)
        assert model.training
        assert kinds == [type(module) for module in model.modules()]
        assert model.config._attn_implementation == attention
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        model.eval()
        assert torch.equal(fast(prompts()).logits, model(prompts()).logits)
        same(model, fast, prompts(), max_new_tokens=8)


def test_moving(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, draft="ngram")
    assert loaded.to("cpu") is loaded and loaded.eval() is loaded and loaded.float() is loaded
    expected = loaded.generate(prompts(), max_new_tokens=8)
    assert loaded.bfloat16().dtype == torch.bfloat16
    assert loaded.to(torch.float32).generate(prompts(), max_new_tokens=8).tolist() == expected.tolist()
    with pytest.raises(RequestError, match="forward"):
        loaded(prompts())
    with pytest.raises(AttributeError, match="lm_head"):
        _ = loaded.lm_head
    accelerated = foredraft.accelerate(llama, draft=None)
    assert accelerated.lm_head is llama.lm_head
    with pytest.raises(RequestError, match="object in memory"):
        accelerated.to(torch.bfloat16)


def test_in_a_pipeline(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    pipe = transformers.pipeline("text-generation", model=llama_fast, tokenizer=tokenizer())
    found = pipe("a story", max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = tokenizer()("a story", return_tensors="pt").input_ids
    assert found == tokenizer().decode(continuation(llama, ids, 8), skip_special_tokens=True)


def test_generate_within_generate(llama_fast: SpeculativeModel) -> None:
    class Nested(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
            return llama_fast.generate(input_ids, max_new_tokens=2)

    with pytest.raises(RequestError, match="within"):
        llama_fast.generate(prompts(), max_new_tokens=4, stopping_criteria=[Nested()])


def test_a_processor_that_raises_is_heard(llama_fast: SpeculativeModel) -> None:
    class Fails(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        llama_fast.generate(prompts(), max_new_tokens=4, logits_processor=[Fails()])
    assert llama_fast.generate(prompts(), max_new_tokens=4).shape[1] == prompts().shape[1] + 4


def test_a_watermark_that_counts_its_calls_is_refused(llama_fast: SpeculativeModel) -> None:
    mark = transformers.SynthIDTextWatermarkingConfig(keys=[1, 2, 3, 9], ngram_len=3)
    with pytest.raises(RequestError, match=r"watermarking_config=SynthID.* cannot be honoured"):
        llama_fast.generate(prompts(), max_new_tokens=4, watermarking_config=mark)


def test_a_processor_that_counts_its_calls_is_an_error_and_not_another_text(llama_fast: SpeculativeModel) -> None:
    class Counts(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return scores.roll(self.calls, -1)

    with pytest.raises(ExactnessError, match="Counts answers differently"):
        llama_fast.generate(prompts(), max_new_tokens=NEW, logits_processor=[Counts()])


def test_threads_take_turns(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    found: dict[int, list[list[int]]] = {}

    def run(seed: int) -> None:
        found[seed] = llama_fast.generate(prompts(seed=seed), max_new_tokens=NEW).tolist()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: llama.generate(prompts(seed=seed), max_new_tokens=NEW).tolist() for seed in range(4)}


def test_the_default_draft_is_the_model_itself(plain: PreTrainedModel, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, speculative=True, policy="fixed")
    assert loaded.engine.drafter.name == foredraft.accelerate(plain).engine.drafter.name == "int4"
    same(plain, loaded, padded(), max_new_tokens=NEW, pad_token_id=3)
    assert 0 < loaded.n_matched < loaded.n_drafted
