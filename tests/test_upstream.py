"""The seam to transformers and torch: names stay in it; what others make of a model is served or refused by name."""

import functools
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from models import CONFIGS, ROPE, SOMETIMES_INEXACT, VOCAB, draws, tiny
from torch import nn
from transformers import PreTrainedModel

import foredraft
from foredraft import LLM, SamplingParams, accelerate
from foredraft.errors import ModelError, RequestError, UnsupportedModelError
from foredraft.models import load, pretrained
from foredraft.models.hf import HFModel
from foredraft.upstream import kernels
from foredraft.upstream.modules import is_product
from foredraft.upstream.progress import no_loading_bars
from foredraft.upstream.weights import empty_model
from foredraft.weights.quantize import Int4Linear, Quantizer

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
from model_sweep import FAULTS, NEW, outcome, report

PACKAGE = Path(foredraft.__file__).parent
# Inside names that the linter cannot tell from ours: public by spelling, or in a string.
INSIDE = r"""all_tied_weights_keys|is_initialized|inv_freq|_hf_hook|_is_stateful|_orig_mod|_forward_hooks|__getstate__
|register_parameter|set_attn_implementation|set_experts_implementation|initialize_weights|gate_up_proj|is_transposed"""
PROMPT = draws(20)
PARAMS = SamplingParams(max_new_tokens=24)


def said(model: PreTrainedModel, prompt: list[int] = PROMPT, count: int = 24) -> list[int]:
    """transformers' own greedy text."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def ours(model: Any, prompt: list[int] = PROMPT, params: SamplingParams = PARAMS) -> list[int]:
    return LLM(model, "ngram").generate(prompt, params, num_draft_tokens=3).token_ids


def test_inside_names_stay_in_the_seam() -> None:
    pattern = re.compile(rf"\b({INSIDE})\b", re.VERBOSE)
    outside = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "upstream"]
    found = {path.name: sorted(set(pattern.findall(path.read_text(encoding="utf-8")))) for path in outside}
    own = {"linear.py": ["is_initialized"]}
    assert not {name: names for name, names in found.items() if names and own.get(name) != names}
    seam = "".join(path.read_text(encoding="utf-8") for path in (PACKAGE / "upstream").glob("*.py"))
    assert len(set(pattern.findall(seam))) > 10, "the pattern knows what is in there"


# --- loading ------------------------------------------------------------


@pytest.mark.parametrize("name", list(CONFIGS))
def test_an_empty_model_has_the_buffers_of_a_loaded_one_and_no_weights(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path)
    loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    empty = empty_model(t.AutoConfig.from_pretrained(tmp_path), torch.bfloat16)
    assert all(parameter.is_meta for parameter in empty.parameters())
    wanted = dict(loaded.named_buffers())
    assert dict(empty.named_buffers()).keys() == wanted.keys()
    assert all(torch.equal(buffer, wanted[key]) for key, buffer in empty.named_buffers())


def test_making_an_empty_model_concerns_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[nn.Module] = []
    init = t.LlamaForCausalLM.__init__

    def beside(self: Any, *args: Any) -> None:
        thread = threading.Thread(target=lambda: others.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        init(self, *args)

    monkeypatch.setattr(t.LlamaForCausalLM, "__init__", beside)
    empty_model(CONFIGS["llama"], torch.float32)
    assert [other.weight.device.type for other in others] == ["cpu"]


@pytest.mark.parametrize(("owner", "name"), [(pretrained, "check_source"), (load, "check_supported")])
def test_a_load_checks_once(owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    calls: list[object] = []
    check = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda source: (calls.append(source), check(source)))
    LLM(tmp_path, "none")
    assert len(calls) == 1


@pytest.mark.parametrize(
    "source", ["x" * 5000, "org/" + "y" * 300, "a\0b", Path("z" * 300)], ids=["long", "long part", "null", "long path"]
)
def test_what_cannot_be_a_name(source: str | Path) -> None:
    with pytest.raises(ModelError, match="is no model; give a folder or a hub name") as caught:
        LLM(source)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("source", [42, nn.Linear(2, 2), ["a"]], ids=["number", "module", "list"])
def test_what_is_no_model(source: Any) -> None:
    with pytest.raises(RequestError, match="is no model; give a folder, a hub name or a transformers model"):
        LLM(source)


# --- rope ------------------------------------------------------------


def rope(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "dynamic":
        scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        config = t.LlamaConfig(**{**ROPE, "max_position_embeddings": 64}, rope_parameters=scaling)
    else:
        scaling = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
                   "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}  # fmt: skip
        config = t.Phi3Config(**ROPE, rope_parameters=scaling, original_max_position_embeddings=64)
    return t.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_do_not_depend_on_what_a_model_has_done(kind: str) -> None:
    wanted, long = said(rope(kind)), torch.tensor([draws(100)])
    model = rope(kind)
    model(long)
    llm = LLM(model, "ngram")
    assert llm.max_model_len == 64
    assert llm.generate(PROMPT, PARAMS).token_ids == wanted
    model(long)
    assert llm.generate(PROMPT, PARAMS).token_ids == wanted, "nor on what it does beside us"


# --- what others make of a model ------------------------------------------------------------


class Lora(nn.Module):
    """As PEFT's layer: reads the weights of its parts."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = (
            nn.Linear(base.in_features, 4, bias=False),
            nn.Linear(4, base.out_features, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.lora_A(x.to(self.lora_A.weight.dtype))
        return self.base_layer(x) + nn.functional.linear(low, self.lora_B.weight)


def with_adapter(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
    return model.eval()


class PeftModel(nn.Module):
    """As PEFT's class of this name."""

    __module__ = "peft.peft_model"

    def __init__(self, model: PreTrainedModel, prompt_learning: bool = False) -> None:
        super().__init__()
        self.base_model = model
        self.active_peft_config = type("Config", (), {"is_prompt_learning": prompt_learning})

    def get_base_model(self) -> nn.Module:
        return self.base_model


@pytest.mark.parametrize("draft", ["ngram", "int4", "int8"])
def test_an_adapter_is_served_on_its_own_modules(draft: str) -> None:
    model = with_adapter(tiny("llama"))
    assert said(model) != said(tiny("llama"))
    assert LLM(model, draft).generate(PROMPT, PARAMS, num_draft_tokens=3).token_ids == said(model)


def test_a_peft_model_is_the_model_inside() -> None:
    model = with_adapter(tiny("llama"))
    peft = PeftModel(model)
    assert ours(peft) == said(model)
    ids = torch.tensor([PROMPT])
    assert accelerate(peft).generate(ids, max_new_tokens=24, do_sample=False)[0, 20:].tolist() == said(model)
    assert LLM(tiny("llama"), PeftModel(tiny("llama", seed=1))).generate(PROMPT, PARAMS).token_ids == said(
        tiny("llama")
    )


def test_a_peft_model_with_virtual_tokens_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="virtual tokens before the text"):
        LLM(PeftModel(tiny("llama"), prompt_learning=True))


@pytest.mark.filterwarnings("ignore")  # peft has its own
@pytest.mark.parametrize("way", ["add_adapter", "PeftModel", "folder"])
def test_real_adapters(way: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = tiny("llama")
    if way == "PeftModel":
        wrapped = peft.get_peft_model(model, config).eval()
        assert ours(wrapped) == said(wrapped)
        return
    try:
        model.add_adapter(config)
    except ValueError as error:
        pytest.skip(str(error))  # this transformers asks for a newer peft
    model.eval()
    if way == "add_adapter":
        assert ours(model) == said(model)
        return
    tiny("llama").save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert ours(tmp_path) == said(model)


def test_folders_with_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter without its model; merge it"):
        LLM(tmp_path)
    tiny("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("foredraft.weights.checkpoint.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="holds an adapter beside its model, which takes peft to load"):
        LLM(tmp_path)


def test_a_compiled_model_is_the_model_inside() -> None:
    model = tiny("llama")
    compiled = torch.compile(model, backend="eager")
    assert ours(compiled) == said(model)
    ids = torch.tensor([PROMPT])
    assert accelerate(compiled).generate(ids, max_new_tokens=24, do_sample=False)[0, 20:].tolist() == said(model)


def compiled_forward(model: PreTrainedModel) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def compiled_part(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")


def compiled_in_place(model: PreTrainedModel) -> None:
    model.compile(backend="eager")


@pytest.mark.parametrize("change", [compiled_forward, compiled_part, compiled_in_place])
def test_compiled_parts_are_left_out(change: Callable[[PreTrainedModel], None]) -> None:
    model = tiny("llama")
    wanted = said(model)
    change(model)
    assert ours(model) == wanted


def on_the_model(model: PreTrainedModel) -> None:
    original = model.forward
    model.forward = functools.wraps(original)(lambda *args, **kwargs: original(*args, **kwargs))


def on_a_part(model: PreTrainedModel) -> None:
    original = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: 2 * original(x)


@pytest.mark.parametrize(
    ("change", "whose"), [(on_the_model, "forward"), (on_a_part, r"model\.layers\.1\.mlp\.forward")]
)
def test_a_forward_that_stays_with_the_original_is_refused(change: Callable[[Any], None], whose: str) -> None:
    model = tiny("llama")
    change(model)
    with pytest.raises(
        UnsupportedModelError, match=rf"its {whose} was replaced on the object by a function.* \(del model"
    ):
        LLM(model)


class Older(t.LlamaForCausalLM):
    """Remote code as it was written for older caches."""

    @functools.wraps(t.LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        cache.get_usable_length(1)
        return super().forward(*args, **kwargs)


def test_code_for_older_caches_is_refused_with_the_cause() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"'llama' cannot serve: its own code fails .*get_usable_length"
    ) as caught:
        LLM(Older(CONFIGS["llama"]))
    assert isinstance(caught.value.__cause__, AttributeError)


# --- kinds of models ------------------------------------------------------------


def test_one_notion_of_a_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights are not packed, an int4 draft converts the layers that are packed elsewhere."""
    monkeypatch.setattr(kernels, "can_prepack", lambda: False)
    model = HFModel(tiny("falcon"))
    layers = sum(is_product(module) for module in model.model.modules())
    made = model.variant(Quantizer("int4")).model.modules()
    assert sum(isinstance(module, Int4Linear) for module in made) == layers > 4


@pytest.mark.parametrize("name", ["bart", "opt", "whisper"])
def test_positions_that_a_model_counts_itself_suffice_for_padding(name: str) -> None:
    """Rows beside a longer draft are padded: near the end there are no positions for that."""
    sizes = dict(vocab_size=VOCAB, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96,
                 init_std=0.35, pad_token_id=0, bos_token_id=None, eos_token_id=None, forced_eos_token_id=None,
                 is_decoder=True, is_encoder_decoder=False)  # fmt: skip
    torch.manual_seed(0)
    if name == "opt":
        config: Any = t.OPTConfig(**{**CONFIGS["opt"].to_dict(), "max_position_embeddings": 64})
    elif name == "bart":
        config = t.BartConfig(**sizes, max_position_embeddings=64)
    else:
        config = t.WhisperConfig(**sizes, max_target_positions=64, decoder_start_token_id=1)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    llm = LLM(model, "ngram", max_batch_size=2)
    prompts = [draws(40), draws(9, seed=1)]
    counts = [llm.max_model_len - len(prompt) for prompt in prompts]
    each = [SamplingParams(max_new_tokens=count, ignore_eos=True) for count in counts]
    texts = [result.token_ids for result in llm.generate(prompts, each, num_draft_tokens=12)]
    assert texts == [said(model, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]


SERVED = (
    "bart cohere2 deepseek_v3 gemma3n_text gemma4_text hunyuan_v1_moe longcat_flash phimoe qwen3_moe roformer whisper"
)
REFUSED = "cpmant dory gpt_neox_japanese mamba prophetnet xlm xmod"


@pytest.mark.parametrize("kind", SERVED.split())
@pytest.mark.filterwarnings(f"{'default' if SOMETIMES_INEXACT else 'error'}::foredraft.errors.ExactnessWarning")
def test_a_sample_of_what_serves(kind: str) -> None:
    assert outcome(kind).verdict in ("equal", "not built")  # some types are newer than others


@pytest.mark.parametrize("kind", REFUSED.split())
def test_a_sample_of_what_does_not(kind: str) -> None:
    assert outcome(kind).verdict in ("refused", "not built")


def test_the_sweep_notices_another_text(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.arange(float(VOCAB))
    monkeypatch.setattr("model_sweep._generated", lambda *_, **__: ([VOCAB - 1] * NEW, [logits] * NEW))
    found = outcome("gpt2")
    assert found.verdict in FAULTS
    assert "another text" in report([found])


# --- progress bars ---


def test_loading_draws_no_bars_and_leaves_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """transformers drew "Loading weights" into every program that loaded with us."""
    from transformers.utils import logging

    tiny("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(logging, "_tqdm_active", True)
    capfd.readouterr()
    load.load_target(tmp_path, load.LoadOptions())
    load.load_target(tmp_path, load.LoadOptions(weight_format="int8"))
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
    t.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "Loading weights" in capfd.readouterr().err


def test_bars_come_back_when_the_last_of_several_threads_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", True)
    first, second = no_loading_bars(), no_loading_bars()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not logging.is_progress_bar_enabled()
    second.__exit__(None, None, None)
    assert logging.is_progress_bar_enabled()
    monkeypatch.setattr(logging, "_tqdm_active", False)  # a user who wants none
    with no_loading_bars():
        pass
    assert not logging.is_progress_bar_enabled()
