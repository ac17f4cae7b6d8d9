"""The drop-in: what it cannot honour it refuses by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dropin import NEW, Seen, prompts
from models import VOCAB
from transformers import GenerationConfig, PreTrainedModel

import foredraft
from foredraft.errors import ModelError, PromptTooLongError, RequestError, UnsupportedModelError
from foredraft.integrations.transformers import AutoModelForCausalLM, SpeculativeModel
from foredraft.weights.convert import convert


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("num_beam_groups", 2),
        ("constraints", ["x"]),
        ("force_words_ids", [[1]]),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("guidance_scale", 1.5),
        ("token_healing", True),
        ("output_scores", True),
        ("output_logits", True),
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("inputs_embeds", torch.zeros(1, 2, 3)),
        ("past_key_values", object()),
        ("cache", object()),
        ("position_ids", torch.zeros(1, 12)),
        ("use_cache", False),
        ("cache_implementation", "static"),
        ("assistant_early_exit", 2),
        ("assistant_tokenizer", object()),
        ("custom_generate", "somebody/repo"),
        ("negative_prompt_ids", torch.ones(1, 2)),
        ("use_mtp", True),
        ("speculation_type", "dflash"),
        ("assistant_ensemble_weight", 0.5),
        ("th_batch_num", 4),
        ("num_assistant_tokens", 0),
        ("num_assistant_tokens", 10**6),
        ("num_assistant_tokens_schedule", "often"),
        ("assistant_confidence_threshold", 1.5),
        ("max_matching_ngram_size", 3),
        ("lookahead", -1),
        ("num_draft_tokens", 10**6),
        ("max_step_draft", 10**6),
        ("th_stop_draft", 7),
        ("auto_parameters", [4, 0.5, 0.9, 1e-2, 0.9]),
        ("seed", -1),
        ("seed", True),
        ("verifier", "none"),
        ("temperature", 0.0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(llama_fast: SpeculativeModel, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        llama_fast.generate(prompts(), max_new_tokens=4, do_sample=name == "temperature", **{name: value})
    assert not llama_fast.engine.has_work


def test_refused_in_a_configuration(llama_fast: SpeculativeModel) -> None:
    with pytest.raises(RequestError, match="num_beams=3 cannot be honoured"):
        llama_fast.generate(prompts(), generation_config=GenerationConfig(num_beams=3, max_new_tokens=4))


def test_unknown_options_raise_as_in_transformers(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    for model in (llama, llama_fast):
        with pytest.raises(ValueError, match="max_new_token"):
            model.generate(prompts(), max_new_token=4)
        with pytest.raises(ValueError, match="token_type_ids"):
            model.generate(prompts(), max_new_tokens=4, token_type_ids=prompts())


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3, "lookahead": 3},
        {"assistant_model": "m", "prompt_lookup_num_tokens": 3},
        {"num_assistant_tokens": 3, "max_step_draft": 3},
        {"lookahead": 3, "th_stop_draft": 0.5},
    ],
)
def test_contradictions_are_refused(llama_fast: SpeculativeModel, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r" and |different rules"):
        llama_fast.generate(prompts(), max_new_tokens=4, **options)


def test_prompts_that_cannot_be_decoded(llama_fast: SpeculativeModel) -> None:
    right = {"input_ids": prompts(), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    right["attention_mask"][0, -1] = 0
    with pytest.raises(RequestError, match="ends with 0"):
        llama_fast.generate(**right, max_new_tokens=4)
    with pytest.raises(RequestError, match="no token"):
        llama_fast.generate(prompts(), attention_mask=torch.zeros(1, 12, dtype=torch.long), max_new_tokens=4)
    with pytest.raises(PromptTooLongError, match="at most max_new_tokens=1012"):
        llama_fast.generate(prompts(), max_new_tokens=1013)
    with pytest.raises(RequestError, match="outside the vocabulary"):
        llama_fast.generate(torch.tensor([[VOCAB]]), max_new_tokens=4)
    with pytest.raises(ValueError, match="max_length"):
        llama_fast.generate(prompts(), max_length=5)


def test_rows_of_different_length_need_a_pad_token(llama_fast: SpeculativeModel) -> None:
    class Ends(Seen):
        eos_token_id = None

    with pytest.raises(RequestError, match="pad_token_id=None"):
        llama_fast.generate(prompts(3), max_new_tokens=NEW, stopping_criteria=[Ends(*range(40))])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_in_low_bit": "sym_int4"}, "load_in_low_bit='sym_int4'"),
        ({"load_in_4bit": True}, "load_in_4bit=True cannot be honoured"),
        ({"load_in_8bit": True}, "load_in_8bit=True cannot be honoured"),
        ({"load_in_low_bit": "bf16", "torch_dtype": torch.float32}, "contradict"),
        ({"optimize_model": False}, "optimize_model=False"),
        ({"use_cache": False}, "use_cache=False"),
        ({"speculative": False, "draft": "ngram"}, "speculative=False contradicts"),
    ],
)
def test_loading_options_refused(llama: PreTrainedModel, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path, **options)


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "nothing", draft="ngram")


def test_an_unknown_loading_option(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="gibberish"):
        AutoModelForCausalLM.from_pretrained(tmp_path, draft="ngram", gibberish=1)


def test_a_model_that_cannot_be_rewound() -> None:
    from models import mamba

    with pytest.raises(UnsupportedModelError, match="mamba"):
        foredraft.accelerate(mamba(), draft=None)


def test_a_low_bit_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("low") / "int4"
    convert(checkpoint, folder, "int4")
    with pytest.raises(RequestError, match=r"speculative=True .* holds low-bit weights already"):
        AutoModelForCausalLM.from_pretrained(folder, speculative=True)
    with pytest.raises(RequestError, match="revision cannot be honoured"):
        AutoModelForCausalLM.from_pretrained(folder, revision="main")
    plainly = AutoModelForCausalLM.from_pretrained(folder, speculative=False)
    drafting = AutoModelForCausalLM.from_pretrained(folder)
    assert drafting.engine.drafter.name == "ngram"
    ids = prompts(2).repeat(1, 3)
    expected = plainly.generate(ids, max_new_tokens=NEW)
    options = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    assert drafting.generate(ids, max_new_tokens=NEW, **options).tolist() == expected.tolist()
    assert drafting.n_drafted > 0
