"""Makes a checkpoint that costs what a larger Llama costs and computes what a small one computes.

    python benchmarks/widen.py runs/350M --dtype bfloat16
    python benchmarks/widen.py runs/wide --hidden 1536 --intermediate 5632 --layers 12 --heads 24 --kv-heads 8

Owns the map from a small checkpoint's weights to those of a larger shape. The residual stream gets dimensions that
nothing writes to: the rows of the embedding, o_proj and down_proj there are zero, and so are the columns that would
read added heads and added intermediate units. Whatever reads only such zeros, or feeds only into them, holds noise of
the same mean and spread as the real weights around it, so that it quantises like them.

Added layers stand between the real ones. Each is a copy of the real layer before it whose o_proj and down_proj are
zero, so it passes its input on. Drafts that skip layers get these for free: do not measure those here.

RMSNorm of d real and D - d zero entries: the mean of squares shrinks by d / D. With eps scaled by d / D the whole root
shrinks by sqrt(d / D), and with the weight scaled by sqrt(d / D) the quotient is the old one. Where D / d is a power of
four, as by default, both are exact in any dtype; elsewhere a bfloat16 checkpoint rounds its norms anew.

Without OUT, prints the shape and writes nothing.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import sqrt
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from foredraft.llm import BUNDLED

Axes = tuple[int, ...]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WRITES = ("embed_tokens", "o_proj", "down_proj")  # what adds to the residual stream: padded with zeros, not with noise
NORMS = ("norm", "input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a checkpoint is widened to; about 350M parameters. The head dimension and the vocabulary stay."""

    hidden: int = 1024
    intermediate: int = 3584
    layers: int = 24
    heads: int = 16
    kv_heads: int = 8


SHAPES = {"344M": Shape(), "1.0B": Shape(2048, 5632, 22, 32, 4)}  # the latter: TinyLlama 1.1B, but for its vocabulary


def widened_config(config: LlamaConfig, shape: Shape) -> LlamaConfig:
    """
    Raises:
        ValueError: `shape` cannot hold a model of `config`.
    """
    _check(config, shape)
    changed = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps * config.hidden_size / shape.hidden,
    }
    return LlamaConfig(**{**config.to_dict(), **changed})


def _check(config: LlamaConfig, shape: Shape) -> None:
    if config.attention_bias or config.mlp_bias:
        raise ValueError("only layers without biases can be widened")
    if shape.heads % shape.kv_heads:
        raise ValueError(f"{shape.heads} heads cannot share {shape.kv_heads} kv heads evenly")
    if shape.hidden % shape.heads:
        raise ValueError(f"hidden: {shape.hidden} is not a multiple of {shape.heads} heads")
    queries = config.num_attention_heads // config.num_key_value_heads
    least = {
        "hidden": (shape.hidden, config.hidden_size),
        "intermediate": (shape.intermediate, config.intermediate_size),
        "layers": (shape.layers, config.num_hidden_layers),
        "kv heads": (shape.kv_heads, config.num_key_value_heads),
        "heads for each kv head": (shape.heads // shape.kv_heads, queries),
    }
    for name, (asked, needed) in least.items():
        if asked < needed:
            raise ValueError(f"{name}: {asked} is less than the model's own {needed}")


def skeleton(config: LlamaConfig) -> LlamaForCausalLM:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def widened_state(model: LlamaForCausalLM, config: LlamaConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict of a model of `config`, a widened one, that computes what `model` computes."""
    source, old, new = model.state_dict(), _axes(model.config), _axes(config)
    random = torch.Generator().manual_seed(0)
    state = {}
    for name, like in skeleton(config).state_dict().items():
        origin, muted = _origin(name, model.config.num_hidden_layers, config.num_hidden_layers)
        part = "embed_tokens" if name == "lm_head.weight" else name.split(".")[-2]
        weight = source[origin].float()
        if muted and part in WRITES:
            weight = torch.zeros_like(weight)
        made = _pad(weight.view(old[part]), new[part], None if part in WRITES else random)
        if part in NORMS:
            made *= sqrt(model.config.hidden_size / config.hidden_size)
        state[name] = made.reshape(like.shape).to(dtype)
    return state


def _axes(config: LlamaConfig) -> Mapping[str, Axes]:
    """By module, the axes of its weight with heads apart, so that a smaller weight is a corner of a larger one."""
    hidden, inner, kv, dim = (
        config.hidden_size,
        config.intermediate_size,
        config.num_key_value_heads,
        config.head_dim,
    )
    queries = config.num_attention_heads // kv
    return {
        "embed_tokens": (config.vocab_size, hidden),
        "q_proj": (kv, queries, dim, hidden),
        "k_proj": (kv, dim, hidden),
        "v_proj": (kv, dim, hidden),
        "o_proj": (hidden, kv, queries, dim),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        **{norm: (hidden,) for norm in NORMS},
    }


def _origin(name: str, old: int, new: int) -> tuple[str, bool]:
    """The small model's name for what `name` is made from, and whether `name` is in an added layer."""
    if ".layers." not in name:
        return name, False
    head, _, rest = name.partition(".layers.")
    number, _, rest = rest.partition(".")
    layer = int(number)
    origin = layer * old // new
    added = layer > 0 and (layer - 1) * old // new == origin
    return f"{head}.layers.{origin}.{rest}", added


def _pad(weight: torch.Tensor, axes: Axes, random: torch.Generator | None) -> torch.Tensor:
    """`weight` as the first corner of a tensor of `axes`; zeros around it, or noise that looks like it."""
    if random is None:
        made = torch.zeros(axes)
    else:
        made = torch.randn(axes, generator=random) * weight.std() + weight.mean()
    made[tuple(slice(length) for length in weight.shape)] = weight
    return made


def widen(source: Path, out: Path, shape: Shape, dtype: torch.dtype) -> None:
    """Write `source`, widened to `shape`, into the folder `out`: an ordinary checkpoint with its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(source)
    config = widened_config(model.config, shape)
    config.dtype = dtype
    wide = skeleton(config)
    wide.load_state_dict(widened_state(model, config, dtype), assign=True)
    wide.tie_weights()
    wide.generation_config = model.generation_config
    wide.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="folder to write; without it, only the shape is printed")
    parser.add_argument("--source", type=Path, default=BUNDLED / "target", help="folder; default: the bundled target")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    for size in fields(Shape):
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=int, default=size.default)
    args = parser.parse_args()
    shape = Shape(**{size.name: getattr(args, size.name) for size in fields(Shape)})
    try:
        config = widened_config(LlamaConfig.from_pretrained(args.source), shape)
    except ValueError as error:
        parser.error(str(error))
    if args.out is not None:
        widen(args.source, args.out, shape, DTYPES[args.dtype])
    print(json.dumps({**asdict(shape), "parameters": skeleton(config).num_parameters()}))


if __name__ == "__main__":
    main()
