"""The drop-in for transformers: the same call gives the same tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dropin import NEW, continuation, near, padded, prompts, same
from models import VOCAB, tiny
from transformers import GenerationConfig, PreTrainedModel

import foredraft
from foredraft.integrations.transformers import AutoModelForCausalLM, SpeculativeModel


def test_greedy(plain: PreTrainedModel, fast: SpeculativeModel) -> None:
    same(plain, fast, prompts(), max_new_tokens=NEW, do_sample=False)
    assert 0 < fast.n_matched < fast.n_drafted  # some drafts were right and some were wrong


@pytest.mark.parametrize("draft", [None, "ngram"])
def test_loaded_from_a_folder(plain: PreTrainedModel, draft: str | None, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, speculative=draft is not None, draft=draft, policy="fixed")
    assert (loaded.device.type, loaded.dtype) == ("cpu", torch.float32)
    assert loaded.config.model_type == plain.config.model_type
    same(plain, loaded, prompts(2), max_new_tokens=NEW, do_sample=False)
    assert draft is None or loaded.n_drafted > 0
    assert draft is not None or loaded.n_drafted == 0


def test_a_draft_folder(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "target")
    near(llama).save_pretrained(tmp_path / "draft")
    folders = {"draft": tmp_path / "draft", "speculative": True, "policy": "fixed"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target", **folders)
    same(llama, loaded, prompts(), max_new_tokens=NEW)
    assert loaded.n_matched > 0


def test_end_of_sequence(plain: PreTrainedModel, fast: SpeculativeModel) -> None:
    ids = prompts(seed=3)
    text = continuation(plain, ids)
    for eos in (text[7], [text[9], text[5], 2], [text[0]]):
        found = same(plain, fast, ids, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=0)
        assert found.shape[1] < 12 + NEW


def test_left_padded_batch(plain: PreTrainedModel, fast: SpeculativeModel) -> None:
    found = same(plain, fast, padded(), max_new_tokens=NEW, eos_token_id=list(range(8, 24)), pad_token_id=3)
    assert (found[:, -1] == 3).any() or found.shape[1] == 12 + NEW
    assert found[0, :5].tolist() == [3] * 5


def test_the_mask_is_inferred_from_the_pad_token(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    ids = padded()["input_ids"]
    same(llama, llama_fast, ids, max_new_tokens=NEW, eos_token_id=9, pad_token_id=3)


def test_a_hole_in_the_mask(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    inputs = padded()
    inputs["attention_mask"][1, 4:6] = 0
    same(llama, llama_fast, inputs, max_new_tokens=NEW, pad_token_id=3)


def test_more_rows_than_run_at_once(llama: PreTrainedModel) -> None:
    few = foredraft.accelerate(llama, draft="ngram", max_batch_size=2)
    same(llama, few, prompts(5), max_new_tokens=12)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 20},
        {"max_new_tokens": 1},
        {"max_new_tokens": NEW, "min_new_tokens": 20, "eos_token_id": list(range(4, 80)), "pad_token_id": 3},
        {"max_new_tokens": NEW, "min_length": 30, "eos_token_id": list(range(4, 80)), "pad_token_id": 3},
        {"max_new_tokens": NEW, "repetition_penalty": 1.3},
        {"max_new_tokens": NEW, "no_repeat_ngram_size": 2},
        {"max_new_tokens": NEW, "bad_words_ids": [[5], [9, 12]]},
        {"max_new_tokens": NEW, "suppress_tokens": list(range(30, 90))},
        {"max_new_tokens": NEW, "begin_suppress_tokens": list(range(4, 120))},
        {"max_new_tokens": NEW, "sequence_bias": [[[7], 9.0], [[7, 8], -40.0]], "repetition_penalty": 1.2},
        {"max_new_tokens": 12, "forced_eos_token_id": 9, "eos_token_id": 9, "pad_token_id": 3},
        {"max_new_tokens": NEW, "eos_token_id": 9, "pad_token_id": 3, "exponential_decay_length_penalty": (4, 1.5)},
        {"max_new_tokens": NEW, "renormalize_logits": True, "remove_invalid_values": True},
        {"max_new_tokens": NEW, "generation_config": GenerationConfig(repetition_penalty=1.3)},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(llama: PreTrainedModel, llama_fast: SpeculativeModel, options: dict[str, Any]) -> None:
    same(llama, llama_fast, padded(), do_sample=False, **options)


def test_a_generation_config(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    config = GenerationConfig(max_new_tokens=20, eos_token_id=[9, 10, 11], pad_token_id=3, repetition_penalty=1.2)
    before = config.to_dict()
    same(llama, llama_fast, padded(), generation_config=config)
    assert config.to_dict() == before


def test_the_checkpoints_own_defaults(tmp_path: Path) -> None:
    model = tiny("llama")
    eos = continuation(model, prompts())[6]
    model.generation_config = GenerationConfig(eos_token_id=[eos], pad_token_id=1, max_new_tokens=24, top_k=7)
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, draft="ngram")
    assert loaded.generation_config.top_k == 7
    same(model, loaded, prompts(), do_sample=False, top_k=50)
    a, b = (loaded.generate(prompts(seed=4), seed=seed).tolist() for seed in (1, 2))
    assert a != b  # the checkpoint says that it samples
    loaded.generation_config.do_sample, model.generation_config.do_sample = False, False
    loaded.generation_config.top_k, model.generation_config.top_k = None, None
    same(model, loaded, prompts())


def test_several_return_sequences(llama_fast: SpeculativeModel) -> None:
    found = llama_fast.generate(prompts(2), do_sample=True, num_return_sequences=3, max_new_tokens=8, seed=5)
    assert found.shape == (6, 20)
    assert len({tuple(row) for row in found.tolist()}) == 6


def test_a_dictionary_is_returned(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    found = llama_fast.generate(prompts(), max_new_tokens=8, return_dict_in_generate=True)
    assert found.sequences.tolist() == llama.generate(prompts(), max_new_tokens=8).tolist()


def test_begins_from_bos(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    expected = llama.generate(bos_token_id=5, max_new_tokens=8)
    assert llama_fast.generate(bos_token_id=5, max_new_tokens=8).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 0, "min_p": 0.05, "repetition_penalty": 1.1},
        {"top_k": 0, "typical_p": 0.8},
        {"top_k": 30, "epsilon_cutoff": 0.01, "temperature": 0.8},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_seed_gives_the_same_text_with_and_without_drafting(
    plain: PreTrainedModel, fast: SpeculativeModel, options: dict[str, Any]
) -> None:
    plainly = foredraft.accelerate(plain, draft=None)
    a, b = (m.generate(prompts(2), do_sample=True, max_new_tokens=NEW, seed=7, **options) for m in (plainly, fast))
    assert a.tolist() == b.tolist()
    assert fast.n_matched > 0
    c = fast.generate(prompts(2), do_sample=True, max_new_tokens=NEW, seed=8, **options)
    assert c.tolist() != a.tolist()


def test_torchs_seed_counts_where_none_is_given(llama_fast: SpeculativeModel) -> None:
    texts = []
    for seed in (3, 3, 4):
        transformers.set_seed(seed)
        texts.append(llama_fast.generate(prompts(), do_sample=True, max_new_tokens=NEW).tolist())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("options", [{"temperature": 0.7, "top_k": 5}, {"top_k": 0, "typical_p": 0.5}])
def test_the_first_token_follows_transformers_distribution(
    llama: PreTrainedModel, llama_fast: SpeculativeModel, options: dict[str, Any]
) -> None:
    ids, count = prompts(), 400
    asked = {"do_sample": True, "max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    p = llama.generate(ids, **asked, **options).scores[0][0].softmax(-1)
    out = llama_fast.generate(ids, do_sample=True, max_new_tokens=1, num_return_sequences=count, seed=1, **options)
    found = torch.bincount(out[:, -1], minlength=VOCAB) / count
    assert not found[p == 0].any()
    assert (found - p).abs().sum() / 2 < 0.1
