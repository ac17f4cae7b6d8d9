"""A widened checkpoint computes what the small one computes, at the cost of the larger shape."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foredraft import LLM, SamplingParams
from foredraft.llm import BUNDLED

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "widen.py"
TARGET = BUNDLED / "target"
PROMPTS = ["Once upon a time, there was a little", "The dog ran to the park because"]
SMALL = {"hidden": 384, "intermediate": 896, "layers": 14, "heads": 12, "kv_heads": 3}


def load_script() -> ModuleType:
    spec = spec_from_file_location("widen", SCRIPT)
    module = module_from_spec(spec)
    sys.modules["widen"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


widen = load_script()


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("widened")
    flags = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, str(SCRIPT), str(out), "--dtype", "float32", *flags]
    subprocess.run(command, check=True, capture_output=True)
    return out


def greedy(model: Path) -> list[list[int]]:
    llm = LLM(model, "none", dtype="float32", device="cpu")
    params = SamplingParams(max_new_tokens=48, ignore_eos=True)
    return [result.token_ids for result in llm.generate(PROMPTS, params)]


def test_the_same_tokens(wide):
    expected = greedy(TARGET)
    assert [len(tokens) for tokens in expected] == [48, 48]
    assert greedy(wide) == expected


@torch.inference_mode()
def test_the_same_logits_in_transformers(wide):
    ids = torch.arange(1, 65).view(1, -1)
    old, new = (LlamaForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits for f in (TARGET, wide))
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_norms_are_right_where_eps_matters():
    """Embeddings this small leave eps most of the first norm's root: a wrong eps would show."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-3, pad_token_id=None)
    small = LlamaForCausalLM(config).eval()
    config = widen.widened_config(config, widen.Shape(48, 64, 3, 6, 2))
    state = widen.widened_state(small, config, torch.float32)
    large = LlamaForCausalLM(config).eval()
    large.load_state_dict(state)
    ids = torch.arange(1, 40).view(1, -1)
    torch.testing.assert_close(large(ids).logits, small(ids).logits, rtol=1e-4, atol=1e-6)


def test_the_checkpoint_is_an_ordinary_one(wide):
    model = LlamaForCausalLM.from_pretrained(wide)
    assert model.dtype == torch.float32
    assert model.config.hidden_size == 384 and model.config.num_hidden_layers == 14
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.q_proj.weight.count_nonzero() > 0.99 * 12 * 64 * 384


def test_default_shape_is_350m():
    config = widen.widened_config(LlamaConfig.from_pretrained(TARGET), widen.Shape())
    model = widen.skeleton(config)
    assert 330e6 < model.num_parameters() < 370e6
    assert config.head_dim == 64 and config.rms_norm_eps == 2.5e-7


@pytest.mark.parametrize("name", widen.SHAPES)
def test_shapes_are_called_by_their_size(name):
    config = widen.widened_config(LlamaConfig.from_pretrained(TARGET), widen.SHAPES[name])
    count = widen.skeleton(config).num_parameters()
    assert name in (f"{count / 1e6:.0f}M", f"{count / 1e9:.1f}B")


def test_half_of_the_default_layers_are_added():
    origins = [widen._origin(f"model.layers.{i}.mlp", 12, 24) for i in range(24)]
    assert origins == [(f"model.layers.{i // 2}.mlp", i % 2 == 1) for i in range(24)]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden": 128}, "hidden: 128 is less than the model's own 256"),
        ({"layers": 11}, "layers"),
        ({"kv_heads": 1}, "kv heads"),
        ({"kv_heads": 16}, "heads for each kv head"),
        ({"heads": 15}, "evenly"),
        ({"heads": 24}, "hidden: 1024 is not a multiple of 24 heads"),
    ],
)
def test_a_shape_that_cannot_hold_the_model(shape, message):
    with pytest.raises(ValueError, match=message):
        widen.widened_config(LlamaConfig.from_pretrained(TARGET), widen.Shape(**shape))
