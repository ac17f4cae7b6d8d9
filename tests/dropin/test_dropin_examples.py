"""The drop-in: the reference systems' own examples, with our import."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dropin import NEW, continuation, prompts, tokenizer
from models import tiny
from transformers import PreTrainedModel

import foredraft
from foredraft.errors import ModelError, RequestError
from foredraft.integrations.draft_and_verify import base_generate, infer
from foredraft.integrations.transformers import AutoModelForCausalLM, SpeculativeModel

IPEX_EXAMPLE = """
import time
import torch
from foredraft.integrations.transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(model_path,
                                             optimize_model=True,
                                             torch_dtype=torch.bfloat16,
                                             load_in_low_bit="bf16",
                                             speculative=True,
                                             trust_remote_code=True,
                                             use_cache=True)
tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=True)

with torch.inference_mode():
    inputs = tokenizer(prompt, return_tensors="pt")
    input_ids = inputs.input_ids.to(model.device)
    attention_mask = inputs.attention_mask.to(model.device)
    # warm-up
    output = model.generate(input_ids, max_new_tokens=n_predict, attention_mask=attention_mask, do_sample=False)

    st = time.perf_counter()
    output = model.generate(input_ids, max_new_tokens=n_predict, attention_mask=attention_mask, do_sample=False)
    output_str = tokenizer.decode(output[0], skip_special_tokens=True)
    end = time.perf_counter()

    print(f"E2E Generation time {(end - st):.4f}s")
    print(output_str)
    print(f"Tokens generated {model.n_token_generated}")
    print(f"First token latency {model.first_token_time:.4f}s")

    sampled = model.generate(input_ids, max_new_tokens=n_predict, do_sample=True, top_k=20, top_p=0.9, temperature=0.7,
                             max_step_draft=8, th_stop_draft=0.8, auto_th_stop_draft=True, hf_adjust=False)
    looked_up = model.generate(input_ids, max_new_tokens=n_predict, lookahead=3, max_matching_ngram_size=2)
"""

DRAFT_AND_VERIFY_EXAMPLE = """
import torch
from foredraft.integrations.draft_and_verify import LlamaForCausalLM, infer
from transformers import AutoTokenizer

model = LlamaForCausalLM.from_pretrained(model_path, torch_dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = model.to("cpu").eval()
model.set_skip_layers([1], [1])
skipped = model.get_skip_layers()

result_base = infer(model, tokenizer, prompt, generate_fn="base", max_new_tokens=24, do_sample=False, early_stop=True)
result_essg = infer(model, tokenizer, prompt, generate_fn="essg", max_new_tokens=24, early_stop=True,
                    max_step_draft=12, th_stop_draft=0.60, auto_th_stop_draft=True,
                    auto_parameters=[1, 0.50, 0.90, 1e-2, 0.90], do_sample=False, do_sample_draft=False)
again = infer(model, tokenizer, prompt, generate_fn="essg", max_new_tokens=24, early_stop=True,
              max_step_draft=12, th_stop_draft=result_essg["th_stop_draft"])
sampled = {name: infer(model, tokenizer, prompt, generate_fn=name, max_new_tokens=24, do_sample=True, top_p=0.95,
                       temperature=0.6) for name in ("base", "essg", "sss")}
"""


def run(example: str, **names: Any) -> dict[str, Any]:
    exec(compile(example, "example", "exec"), names)
    return names


def test_ipex_example(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(IPEX_EXAMPLE, model_path=str(checkpoint), prompt="a long story", n_predict=NEW)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.bfloat16, speculative=False)
    expected = plain.generate(found["input_ids"], max_new_tokens=NEW)
    assert found["model"].dtype == torch.bfloat16
    assert found["output"].tolist() == found["looked_up"].tolist() == expected.tolist()
    assert found["sampled"].shape == expected.shape
    assert f"Tokens generated {NEW}" in capsys.readouterr().out


def test_draft_and_verify_example(checkpoint: Path, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREDRAFT_CACHE", str(checkpoint / "cache"))
    found = run(DRAFT_AND_VERIFY_EXAMPLE, model_path=str(checkpoint), prompt="a long story")
    base, essg = found["result_base"], found["result_essg"]
    ids = found["tokenizer"]("a long story", return_tensors="pt").input_ids
    assert base["generate_ids"][0].tolist() == continuation(llama, ids, 24)
    assert essg["generate_ids"].tolist() == base["generate_ids"].tolist() == found["again"]["generate_ids"].tolist()
    assert (essg["completion"], found["skipped"]) == (base["completion"], ((1,), (1,)))
    assert 0 <= essg["matchness"] <= 1 and essg["num_drafted_tokens"] > 0 and essg["time"] > 0
    assert essg["th_stop_draft"] != 0.6  # it adapted
    sampled = {name: result["generate_ids"].tolist() for name, result in found["sampled"].items()}
    assert sampled["base"] == sampled["essg"]
    assert len(sampled["sss"][0]) == 24


def test_draft_and_verify_refusals(llama_fast: SpeculativeModel) -> None:
    words = tokenizer()
    with pytest.raises(RequestError, match="generate_fn='fast' is not known"):
        infer(llama_fast, words, "a", generate_fn="fast")
    with pytest.raises(RequestError, match=r"th_random_draft=0\.5"):
        infer(llama_fast, words, "a", generate_fn="sss", th_random_draft=0.5)
    skipping = foredraft.accelerate(tiny("llama"), draft=None)
    with pytest.raises(ModelError, match="names layer 7"):
        skipping.set_skip_layers([7], [])
    skipping.set_skip_layers([0], [])
    assert skipping.get_skip_layers() == ((0,), ())


def test_the_end_of_sequence_is_a_token_without_early_stop(llama: PreTrainedModel) -> None:
    words = tokenizer()
    ids = prompts()
    words.eos_token = words.convert_ids_to_tokens(continuation(llama, ids)[3])
    model = foredraft.accelerate(llama, draft=None)
    lengths = [base_generate(model, words, ids, 10, early_stop=stop)["generate_ids"].shape[1] for stop in (True, False)]
    assert lengths == [4, 10]


def test_skipped_layers_survive_a_move(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, speculative=False)
    model.set_skip_layers([1], [])
    assert model.to(torch.bfloat16).get_skip_layers() == ((1,), ())
    model.generate(prompts(), max_new_tokens=4, num_draft_tokens=2)
    assert model.n_drafted > 0
