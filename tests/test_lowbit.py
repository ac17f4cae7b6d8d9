"""Low-bit checkpoints: what is written computes what it should, and nothing damaged or half written ever loads."""

import gc
import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from models import ROPE, VOCAB, draws, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from foredraft import LLM, SamplingParams
from foredraft.cli.app import app
from foredraft.errors import ModelError, RequestError
from foredraft.models.base import CausalModel
from foredraft.models.decoder import Decoder
from foredraft.models.hf import HFModel
from foredraft.models.load import LoadOptions, load_model, load_target
from foredraft.models.native import NativeModel
from foredraft.models.rows import Span, plan
from foredraft.native import library
from foredraft.profile import model_hash
from foredraft.weights.choice import chosen_layers
from foredraft.weights.convert import convert
from foredraft.weights.lowbit import MANIFEST, LayerRecord, is_low_bit
from foredraft.weights.quantize import Int4Linear, Int8Linear, QuantLinear, dense
from foredraft.weights.shards import ShardWriter, parse_size
from foredraft.weights.source import _Shards

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("llama", "tied", "gpt2", "gpt_neox")
CPU = LoadOptions("auto", "cpu", runtime="torch")
RUNTIMES = ("torch",) if library.why_not() else ("torch", "native")
STORY = """Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw
a big red ball under a tree. She wanted to play with it, but it was too high for her to reach. Her friend Tom
came and helped her. They were very happy and played with the ball all day. When the sun went down, they went
home and told their moms about the fun they had. The next day, they went to the park again. The ball was gone.
Lily was sad, but Tom said that they could find a new toy to play with. They looked and looked, and then they
found a kite."""


def save(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny model with a tokenizer of as many words."""
    torch.manual_seed(1)
    if name == "tied":
        config = t.LlamaConfig(**ROPE, tie_word_embeddings=True)
        model: Any = t.AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = tiny(name, dtype)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    t.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def source(name: str) -> Path:
        if name not in made:
            made[name] = save(tmp_path_factory.mktemp("source") / name, name)
        return made[name]

    return source


@pytest.fixture(scope="session")
def converted(sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], Path]:
    made: dict[tuple[str, str], Path] = {}

    def folder(name: str, weight_format: Any) -> Path:
        key = (name, weight_format)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("converted") / name
            group = 32 if weight_format == "int4" else None
            convert(sources(name), made[key], weight_format, group_size=group, max_shard_size="40KB")
        return made[key]

    return folder


@pytest.fixture
def llama4(converted: Callable[[str, Any], Path], tmp_path: Path) -> Path:
    """An int4 checkpoint of several shards, to be damaged."""
    return Path(shutil.copytree(converted("llama", "int4"), tmp_path / "model"))


def logits(model: CausalModel, tokens: list[int]) -> torch.Tensor:
    return model.forward(plan([Span(0, 0, tokens, len(tokens))], 4, 128)).clone()


def quantised_in_memory(source: Path, weight_format: str) -> CausalModel:
    """The same model, each layer quantised where it is, without any file."""
    model = t.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    bits = {name: layer.bits for name, layer in chosen_layers(model, int(weight_format[3:])).items()}
    head = model.get_output_embeddings()

    def make(weight: torch.Tensor, bias: torch.Tensor | None, bits: int) -> QuantLinear:
        return Int4Linear(weight, bias, 32) if bits == 4 else Int8Linear(weight, bias)

    if model.config.model_type == "llama":
        tied = model.config.tie_word_embeddings
        plain = Decoder(model).head if tied else make(head.weight, None, 8)
        decoder = Decoder(model, lambda weight, bias: make(weight, bias, int(weight_format[3:])))
        decoder.head = plain
        return decoder
    for name, layer_bits in bits.items():
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, make(dense(layer), layer.bias, layer_bits))
    return HFModel(model)


# What it computes


@pytest.mark.parametrize("weight_format", ["int4", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_model_quantised_in_memory(
    name: str, weight_format: str, sources: Callable[[str], Path], converted: Callable[[str, Any], Path]
) -> None:
    loaded = load_model(converted(name, weight_format), CPU)
    assert isinstance(loaded, Decoder if name in ("llama", "tied") else HFModel)
    assert loaded.dtype == torch.bfloat16
    expected = quantised_in_memory(sources(name), weight_format)
    full = load_model(sources(name), CPU)
    found = logits(loaded, draws(40))
    assert torch.equal(found, logits(expected, draws(40)))
    assert not torch.equal(found, logits(full, draws(40)))
    assert loaded.weight_bytes < full.weight_bytes


@pytest.mark.skipif("native" not in RUNTIMES, reason=library.why_not())
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("weight_format", ["int4", "int8"])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_natively_it_computes_with_the_same_weights(
    name: str, weight_format: str, dtype: str, converted: Callable[[str, Any], Path]
) -> None:
    folder = converted(name, weight_format)
    onto_torch, native = (load_model(folder, LoadOptions(dtype, "cpu", runtime=r)) for r in RUNTIMES)
    assert isinstance(native, NativeModel)
    assert native.kernels[weight_format] == 8 + (name == "llama" and weight_format == "int8")
    assert model_hash(native) == model_hash(onto_torch)
    for ours, theirs in zip(native.weight_sample(), onto_torch.weight_sample(), strict=True):
        assert torch.equal(ours.float(), theirs.float())
    expected, found = logits(onto_torch, draws(40)), logits(native, draws(40))
    assert (found - expected).norm() < 0.1 * expected.norm()  # inputs are rounded to eight bits here, to bf16 there


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("weight_format", ["int4", "int8"])
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_rounded_on_loading_is_what_a_converted_checkpoint_is(
    name: str, weight_format: str, runtime: str, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    if runtime == "native" and name == "gpt2":
        pytest.skip("gpt2 is not of the native family")
    convert(sources(name), tmp_path / "out", weight_format)  # type: ignore[arg-type]
    options = LoadOptions("auto", "cpu", runtime=runtime)
    expected = logits(load_model(tmp_path / "out", options), draws(40))
    rounding = replace(options, weight_format=weight_format)
    assert torch.equal(logits(load_model(sources(name), rounding), draws(40)), expected)
    model = t.AutoModelForCausalLM.from_pretrained(sources(name), dtype=torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert torch.equal(logits(load_model(model, rounding), draws(40)), expected)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("weight_format", ["int4", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_drafting_changes_no_bit(
    name: str,
    weight_format: str,
    dtype: str,
    runtime: str,
    sources: Callable[[str], Path],
    converted: Callable[[str, Any], Path],
) -> None:
    if runtime == "native" and name.startswith("gpt"):
        pytest.skip(f"{name} is not of the native family")
    folder = converted(name, weight_format)
    params = SamplingParams(max_new_tokens=24, logprobs=2, ignore_eos=True)
    prompts = [draws(19, seed=3), draws(140, seed=4)]
    for draft in (sources(name), "int4"):
        llm = LLM(folder, draft, dtype=dtype, device="cpu", runtime=runtime)
        assert llm.model.row_invariance.exact
        plain = llm.generate(prompts, params, num_draft_tokens=0)
        drafted = llm.generate(prompts, params, num_draft_tokens=4)
        assert [r.token_ids for r in plain] == [r.token_ids for r in drafted]
        assert [r.logprobs for r in plain] == [r.logprobs for r in drafted]
        assert sum(r.stats.accepted for r in drafted) > 0


def test_sampling_follows_the_seed(converted: Callable[[str, Any], Path]) -> None:
    llm = LLM(converted("llama", "int4"), "int4", device="cpu")
    params = SamplingParams(temperature=1.0, seed=5, max_new_tokens=30, ignore_eos=True)
    texts = [llm.generate(draws(30), params, num_draft_tokens=n).token_ids for n in (0, 3)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("weight_format", "most"), [("int8", 1.03), ("int4", 1.1)])
def test_perplexity_of_a_trained_model(shared: Path, tmp_path: Path, weight_format: Any, most: float) -> None:
    source = shared / "models" / "stories3M"
    result = convert(source, tmp_path / "out", weight_format)
    assert result.bytes < result.source_bytes * (0.25 if weight_format == "int4" else 0.32)  # of float32
    tokens = t.AutoTokenizer.from_pretrained(tmp_path / "out")(STORY)["input_ids"]

    def perplexity(folder: Path, dtype: str, runtime: str) -> float:
        scores = logits(load_target(folder, LoadOptions(dtype, "cpu", runtime=runtime)), tokens)[:-1].float()
        return math.exp(nn.functional.cross_entropy(scores, torch.tensor(tokens[1:])))

    full = perplexity(source, "float32", "torch")
    for runtime in RUNTIMES:
        assert perplexity(tmp_path / "out", "auto", runtime) < most * full


@pytest.mark.parametrize("name", [*NAMES, "mixtral"])
@pytest.mark.parametrize(("weight_format", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_sixteen_bits_are_an_ordinary_checkpoint(
    name: str, weight_format: Any, dtype: torch.dtype, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(sources(name), tmp_path / "out", weight_format, max_shard_size="100KB")
    assert not is_low_bit(tmp_path / "out")
    original = t.AutoModelForCausalLM.from_pretrained(sources(name), dtype=dtype).state_dict()
    loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert original.keys() == loaded.keys()
    assert all(loaded[key].dtype == dtype and torch.equal(loaded[key], original[key]) for key in original)
    LLM(tmp_path / "out", "ngram", dtype="bfloat16", device="cpu").generate(draws(5), SamplingParams(max_new_tokens=3))


def test_transformers_refuses_quantised_weights(converted: Callable[[str, Any], Path]) -> None:
    with pytest.raises(OSError, match=r"model\.safetensors"):
        t.AutoModelForCausalLM.from_pretrained(converted("llama", "int4"))


# What is quantised


def test_what_is_quantised(sources: Callable[[str], Path], converted: Callable[[str, Any], Path]) -> None:
    for name in NAMES:
        model = t.AutoModelForCausalLM.from_pretrained(sources(name))
        linears = {n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)}
        inside = {n for n in linears if ".0." in n or ".1." in n}
        head = "lm_head" if name in ("llama", "gpt_neox") else None
        layers = json.loads((converted(name, "int4") / MANIFEST).read_text())["layers"]
        assert set(layers) == inside | ({head} if head else set())
        assert {record["bits"] for n, record in layers.items() if n in inside} == {4}
        assert head is None or layers[head]["bits"] == 8


def test_groups_differ_by_layer_and_are_fused(tmp_path: Path) -> None:
    """Projections that the lean decoder makes one layer of may have groups of their own."""
    config = t.LlamaConfig(**{**ROPE, "hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 4})
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(config).eval()
    smooth = torch.linspace(-1, 1, 16).repeat(16).expand(256, -1)  # sixteen values: any group serves
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data = smooth.clone()
    model.bfloat16().save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", "int4")
    layers = json.loads((tmp_path / "out" / MANIFEST).read_text())["layers"]
    sizes = [layers[f"model.layers.0.self_attn.{kind}_proj"]["group_size"] for kind in "qkv"]
    assert sizes[0] > sizes[1] == sizes[2]
    loaded = load_model(tmp_path / "out", CPU)
    assert isinstance(loaded, Decoder)
    parts = [getattr(model.model.layers[0].self_attn, f"{kind}_proj").weight for kind in "qkv"]
    each = torch.cat([Int4Linear(part.detach(), None, size).dense() for part, size in zip(parts, sizes, strict=True)])
    assert torch.equal(loaded.sublayers[0].qkv.dense(), each)
    if "native" in RUNTIMES:
        native = load_model(tmp_path / "out", LoadOptions("auto", "cpu", runtime="native"))
        assert isinstance(native, NativeModel)
        assert torch.equal(native.blocks[0].qkv.dense(), each)
        assert native.blocks[0].qkv.group == sizes[1]


def test_other_files_come_along(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "LICENSE").write_text("free")
    (source / "model.h5").write_text("weights of another kind")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    convert(source, tmp_path / "out", "int8")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"chat_template.jinja", "LICENSE", "tokenizer.json", "generation_config.json", "config.json"} <= names
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    assert "model.h5" not in names
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_pickles_are_read_by_transformers(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources("gpt2"), tmp_path / "source"))
    state = t.AutoModelForCausalLM.from_pretrained(source).state_dict()
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    convert(source, tmp_path / "out", "int4", group_size=32)
    convert(sources("gpt2"), tmp_path / "same", "int4", group_size=32)
    models = [load_model(tmp_path / folder, CPU) for folder in ("out", "same")]
    assert torch.equal(*(logits(model, draws(30)) for model in models))


def test_names_without_the_models_prefix(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """As gpt2 is published: wte.weight, not transformer.wte.weight."""
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(sources("gpt2"), tmp_path / "source"))
    state = load_file(source / "model.safetensors")
    save_file(
        {k.removeprefix("transformer."): v for k, v in state.items()}, source / "model.safetensors", {"format": "pt"}
    )
    convert(source, tmp_path / "out", "int4", group_size=32)
    convert(sources("gpt2"), tmp_path / "same", "int4", group_size=32)
    models = [load_model(tmp_path / folder, CPU) for folder in ("out", "same")]
    assert torch.equal(*(logits(model, draws(30)) for model in models))


# What is refused


def test_a_group_size_that_does_not_divide(sources: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"group size 64 does not divide the 96 inputs of model\.layers\.0\.mlp\.down_proj; use 32,"
    ):
        convert(sources("llama"), tmp_path / "out", "int4", group_size=64)
    with pytest.raises(RequestError, match="group size 48 is not usable; use one of 32, 64, 128, 256"):
        convert(sources("llama"), tmp_path / "out", "int4", group_size=48)
    with pytest.raises(RequestError, match="is for int4"):
        convert(sources("llama"), tmp_path / "out", "int8", group_size=32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [20, 36])
def test_inputs_that_no_group_divides_are_padded(shape: int, tmp_path: Path) -> None:
    config = t.LlamaConfig(**{**ROPE, "intermediate_size": shape})
    torch.manual_seed(0)
    t.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match="leave it out: inputs are padded then"):
        convert(tmp_path / "source", tmp_path / "out", "int4", group_size=32)
    for weight_format in ("int4", "int8"):
        convert(tmp_path / "source", tmp_path / "out", weight_format, overwrite=True)  # type: ignore[arg-type]
        for runtime in RUNTIMES:
            options = LoadOptions("auto", "cpu", runtime=runtime)
            assert logits(load_model(tmp_path / "out", options), draws(9)).isfinite().all()


def test_bad_arguments(sources: Callable[[str], Path], converted: Callable[[str, Any], Path], tmp_path: Path) -> None:
    source: Any = sources("llama")
    with pytest.raises(RequestError, match="'int3' is not known; use one of int4, int8, bf16, fp16"):
        convert(source, tmp_path / "out", "int3")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="'2 parsecs' is not usable"):
        convert(source, tmp_path / "out", max_shard_size="2 parsecs")
    with pytest.raises(ModelError, match="does not exist"):
        convert(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ModelError, match="is quantised already; convert the original"):
        convert(converted("llama", "int8"), tmp_path / "out")
    with pytest.raises(RequestError, match="lie in each other"):
        convert(source, source, overwrite=True)
    with pytest.raises(RequestError, match="lie in each other"):
        convert(source, source / "inside")
    assert list(tmp_path.iterdir()) == []


def test_sizes() -> None:
    assert [parse_size(s) for s in ("2GB", "1.5MiB", "10kb", 7, "8B")] == [2 * 10**9, 3 * 2**19, 10**4, 7, 8]
    for text in ("", "GB", "-1", "0", "1XB", "nan", "inf"):
        with pytest.raises(RequestError, match="is not usable"):
            parse_size(text)


@pytest.mark.parametrize(
    ("value", "weight_format", "match"), [(1e6, "fp16", "reaches 1e.06"), (math.nan, "int4", "damaged")]
)
def test_values_that_the_format_cannot_hold(value: float, weight_format: Any, match: str, tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight.*{match}"):
        convert(tmp_path / "source", tmp_path / "out", weight_format)
    assert not (tmp_path / "out").exists()


def test_a_damaged_source(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ModelError, match="damaged"):
        convert(source, tmp_path / "out")
    (source / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded|damaged"):
        convert(source, tmp_path / "out")


def test_weights_that_should_be_tied(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match="they differ; set tie_word_embeddings to false"):
        convert(source, tmp_path / "out")


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("lowbit-*.safetensors"))[1]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: shard(f).unlink(), r"lacks lowbit-00002-of-\d+\.safetensors; copy it again"),
    "truncated": (
        lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-7]),
        r"lowbit-00002.*has \d+ bytes and should",
    ),
    "edited": (lambda f: flip(shard(f)), r"lowbit-00002.*was changed since it was written"),
    "configuration": (lambda f: flip(f / "config.json"), r"config\.json was changed"),
    "swapped": (
        lambda f: shard(f).write_bytes(shard(f).with_name(sorted(p.name for p in f.glob("low*"))[0]).read_bytes()),
        "lowbit-00002",
    ),
    "version": (lambda f: change_manifest(f, lambda m: m.update(format_version=2)), "format version 2.*reads 1"),
    "no version": (lambda f: change_manifest(f, lambda m: m.pop("format_version")), f"{MANIFEST} is damaged"),
    "half a manifest": (
        lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:500]),
        f"{MANIFEST} is damaged",
    ),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "has no weights|cannot be loaded"),
    "file not listed": (lambda f: change_manifest(f, lambda m: m["files"].pop(0)), "does not list lowbit-00001"),
    "tensor not listed": (
        lambda f: change_manifest(f, lambda m: m["tensors"].pop("model.layers.0.mlp.up_proj.grid")),
        r"does not list the tensor model\.layers\.0\.mlp\.up_proj\.grid",
    ),
    "norm not listed": (
        lambda f: change_manifest(f, lambda m: m["tensors"].pop("model.norm.weight")),
        r"does not list the tensor model\.norm\.weight",
    ),
    "layer not listed": (
        lambda f: change_manifest(f, lambda m: m["layers"].pop("model.layers.1.mlp.up_proj")),
        r"does not list the tensor model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "unknown layer": (
        lambda f: change_manifest(
            f, lambda m: m["layers"].update(other={"bits": 4, "group_size": 32, "shape": [1, 2]})
        ),
        "lists the layer other, which the model lacks",
    ),
    "another width": (
        lambda f: change_manifest(
            f, lambda m: m["layers"]["model.layers.1.mlp.up_proj"].update(bits=8, group_size=None)
        ),
        r"model\.layers\.1\.mlp\.up_proj\.scale",
    ),
    "a width there is not": (
        lambda f: change_manifest(f, lambda m: m["layers"]["model.layers.1.mlp.up_proj"].update(bits=16)),
        "is damaged .a layer of 16 bits",
    ),
    "another group": (
        lambda f: change_manifest(f, lambda m: m["layers"]["model.layers.1.mlp.up_proj"].update(group_size=256)),
        r"model\.layers\.1\.mlp\.up_proj is not stored as .* groups of 256",
    ),
    "another dtype": (lambda f: change_manifest(f, lambda m: m.update(dtype="fooo")), "is damaged .*'fooo'"),
    "no tensors": (lambda f: change_manifest(f, lambda m: m.update(tensors=None)), "is damaged .its tensors are None"),
    "another shape": (
        lambda f: change_manifest(f, lambda m: m["layers"]["model.layers.1.mlp.up_proj"].update(shape=[96, 128])),
        r"model\.layers\.1\.mlp\.up_proj",
    ),
    "no list": (lambda f: (f / MANIFEST).write_text("[1, 2]"), f"{MANIFEST} is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused(kind: str, llama4: Path) -> None:
    load_model(llama4, CPU)
    damage, match = DAMAGE[kind]
    damage(llama4)
    with pytest.raises(ModelError, match=match):
        load_model(llama4, CPU)


def test_damage_to_sixteen_bits_is_refused(sources: Callable[[str], Path], tmp_path: Path) -> None:
    convert(sources("llama"), tmp_path / "out", "bf16")
    flip(tmp_path / "out" / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors was changed"):
        load_model(tmp_path / "out", CPU)


def test_options_that_do_not_fit(llama4: Path) -> None:
    with pytest.raises(RequestError, match="dtype='float16' is not usable with weights in four or eight bits"):
        LLM(llama4, dtype="float16")
    with pytest.raises(RequestError, match="device_map='auto' cannot place low-bit weights"):
        LLM(llama4, device_map="auto")
    with pytest.raises(RequestError, match=r"weight_format='int8' contradicts .*, which holds int4 weights; leave it"):
        LLM(llama4, weight_format="int8")


def test_weight_formats_that_do_not_fit(sources: Callable[[str], Path]) -> None:
    with pytest.raises(RequestError, match="weight_format='bf16' is not known; use int4 or int8; dtype= is for 16"):
        LLM(sources("llama"), weight_format="bf16")
    with pytest.raises(RequestError, match="device_map='auto' cannot place low-bit weights"):
        LLM(sources("llama"), weight_format="int4", device_map="auto")
    with pytest.raises(RequestError, match="dtype='float16' is not usable with weights in four or eight bits"):
        LLM(sources("llama"), weight_format="int4", dtype="float16")


@pytest.mark.skipif("native" not in RUNTIMES, reason=library.why_not())
def test_what_few_bits_the_native_runtime_leaves_to_torch() -> None:
    shape = {**ROPE, "hidden_size": 44, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 22}
    model = t.LlamaForCausalLM(t.LlamaConfig(**shape)).bfloat16().eval()
    assert isinstance(load_model(model, LoadOptions(device="cpu", weight_format="int8")), Decoder)
    with pytest.raises(ModelError, match=r"in few bits it takes head sizes that are multiples of 16, .* is 22"):
        load_model(model, LoadOptions(device="cpu", weight_format="int8", runtime="native"))


# Whole or not there


@pytest.mark.parametrize("error", [RuntimeError("power"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 7, 20])
def test_a_failure_leaves_nothing(
    error: BaseException, after: int, sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, calls = ShardWriter.add, iter(range(10**6))

    def fail(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        if next(calls) == after:
            raise error
        add(self, name, tensor)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(ShardWriter, "add", fail)
        convert(sources("llama"), tmp_path / "out", "int4", max_shard_size="10KB")
    assert list(tmp_path.iterdir()) == []
    convert(sources("llama"), tmp_path / "out", "int4")
    load_model(tmp_path / "out", CPU)


KILLED = """
import os, sys
from foredraft.weights import convert as module
write = module.Manifest.write
def die(self, folder):
    write(self, folder)
    os._exit(9)
if sys.argv[3] == "late":
    module.Manifest.write = die
    module.convert(sys.argv[1], sys.argv[2], "bf16")
module.convert(sys.argv[1], sys.argv[2], "bf16", progress=lambda done, total: done > total / 2 and os._exit(9))
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_what_a_killed_run_leaves_does_not_load(when: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", KILLED, str(sources("llama")), str(out), when]
    assert subprocess.run(command, env=environment, check=False).returncode == 9
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(left, CPU)
    convert(sources("llama"), out, "bf16")
    assert list(tmp_path.iterdir()) == [out]


def test_overwriting(sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    convert(sources("llama"), out, "int8")
    with pytest.raises(RequestError, match="exists; give another folder, or overwrite it"):
        convert(sources("llama"), out, "int4")
    before = (out / MANIFEST).read_text()
    with monkeypatch.context() as patch, pytest.raises(ModelError, match=r"cannot be written.*disk"):

        def full(self: Path, target: Path) -> Path:
            if target == out and self.name.endswith(".partial"):
                raise OSError("disk")
            return Path(os.rename(self, target) or target)

        patch.setattr(Path, "rename", full)
        convert(sources("llama"), out, "int4", overwrite=True)
    assert (out / MANIFEST).read_text() == before
    assert list(tmp_path.iterdir()) == [out]
    convert(sources("llama"), out, "int4", overwrite=True)
    assert is_low_bit(out) and (out / MANIFEST).read_text() != before
    assert list(tmp_path.iterdir()) == [out]


def test_only_checkpoints_are_overwritten(sources: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(RequestError, match="is no checkpoint"):
            convert(sources("llama"), tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "letters.txt").read_text() == "dear"


# Memory


def test_one_tensor_at_a_time(sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get, living, most = _Shards.get, weakref.WeakSet[torch.Tensor](), []

    def counted(self: _Shards, name: str) -> torch.Tensor:
        most.append(len(living))
        tensor = get(self, name)
        living.add(tensor)
        return tensor

    monkeypatch.setattr(_Shards, "get", counted)
    convert(sources("llama"), tmp_path / "out", "int4")
    assert len(most) == 21
    assert max(most) == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which is Linux")
def test_memory_stays_far_below_the_model(tmp_path: Path) -> None:
    config = t.LlamaConfig(**{**ROPE, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12})
    t.LlamaForCausalLM(config).save_pretrained(tmp_path / "source")

    def anonymous() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    for weight_format in ("int4", "int8"):
        gc.collect()
        before, seen = anonymous(), []
        result = convert(
            tmp_path / "source",
            tmp_path / weight_format,
            weight_format,  # type: ignore[arg-type]
            progress=lambda done, total, seen=seen: seen.append(anonymous()),  # type: ignore[misc]
        )
        layer = result.source_bytes / 12
        assert max(seen) - before < 2 * layer


def test_loading_makes_no_full_weights(converted: Callable[[str, Any], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a moment: whatever a quantised layer is made of goes to its kernel in its few bits."""
    for name in NAMES:
        model = load_target(converted(name, "int4"), CPU)
        if isinstance(model, HFModel):
            linears = [m for m in model.model.modules() if isinstance(m, nn.Linear | Conv1D)]
            quantised = [m for m in model.model.modules() if isinstance(m, QuantLinear)]
            assert linears == [] and len(quantised) >= 8
            assert not any(p.is_meta for p in model.model.parameters())


# The command


def test_the_command(sources: Callable[[str], Path], tmp_path: Path) -> None:
    out = str(tmp_path / "out")

    def run(*args: str) -> Any:
        return CliRunner().invoke(app, ["convert", *args], prog_name="foredraft", env={"COLUMNS": "200"})

    done = run(str(sources("llama")), out, "--weight_format", "int4", "--group_size", "32", "--max-shard-size", "40KB")
    assert done.exit_code == 0, done.output
    assert "15 layers in int4" in done.stdout and "files" in done.stdout
    assert is_low_bit(out)
    again = run(str(sources("llama")), out)
    assert again.exit_code == 2 and "exists" in again.stderr
    assert run(str(sources("llama")), out, "--overwrite", "--weight-format", "int8").exit_code == 0
    bad = run(str(sources("llama")), str(tmp_path / "other"), "--group-size", "64")
    assert bad.exit_code == 1 and "does not divide the 96 inputs" in bad.stderr
    assert "--weight-format" in run("--help").stdout


def test_the_command_starts_without_torch() -> None:
    code = "import sys; import foredraft.cli.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 48), (4, 512), (4, None), (8, 32), (5, 32)])
def test_a_record_of_groups_that_no_kernel_takes_is_refused(bits, group):
    """They come from a checkpoint's manifest, which anybody may have written."""
    with pytest.raises(ValueError, match=f"a layer of {bits} bits in groups of {group}"):
        LayerRecord(bits, group, (64, 1024))
