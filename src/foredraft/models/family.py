"""The Llama family as published: what the lean decoder and the native library may compute by code of ours.

Everything here is read off a loaded model; whoever differs in anything runs on its own modules. Computes nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from foredraft.upstream.modules import is_patched

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
OWN_CODE = ("transformers.models.", "transformers.activations", "torch.nn.", "foredraft.")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def supports(model: PreTrainedModel) -> bool:
    """Whether the lean decoder computes what this model computes; the adapter takes every other."""
    return _known(model.config) and _as_published(model) and _as_configured(model)


def _known(config: PreTrainedConfig) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in FAMILY
        and getattr(config, "hidden_act", "silu") == "silu"
        and rope.get("rope_type", "default") in STATIC_ROPE
        and rope.get("partial_rotary_factor", 1.0) == 1.0
    )


def _as_published(model: PreTrainedModel) -> bool:
    """Whether all of it is transformers' own code on weights of one dtype: no subclass, adapter, hook or patch."""
    modules = list(model.modules())
    linears = [m for m in modules if isinstance(m, nn.Linear)]
    return (
        all(type(m).__module__.startswith(OWN_CODE) for m in modules)
        and all(type(m) is nn.Linear for m in linears)
        and not any(is_patched(m) for m in modules)
        and {p.dtype for p in model.parameters()} <= {model.dtype}
        and model.dtype in DTYPES
    )


def _as_configured(model: PreTrainedModel) -> bool:
    """Whether what a layer computes besides its products is what the configuration says, on the objects too."""
    base, activation = model.get_decoder(), type(ACT2FN["silu"])
    table = base.embed_tokens
    return (
        type(table) is nn.Embedding
        and table.max_norm is None
        and all(type(layer.mlp.act_fn) in (activation, nn.SiLU) for layer in base.layers)
        and all(layer.self_attn.is_causal for layer in base.layers)
        and all(layer.self_attn.scaling == layer.self_attn.head_dim**-0.5 for layer in base.layers)
    )


def oddity(model: PreTrainedModel) -> str:
    """What of a model's sizes and formats our code does not expect; empty where there is nothing."""
    base, head = model.get_decoder(), model.get_output_embeddings()
    rows, tokens = base.embed_tokens.num_embeddings, model.config.vocab_size
    if not head.out_features == rows == tokens:
        return f"its head has {head.out_features} outputs, its table {rows} rows, and its vocabulary {tokens} tokens"
    if len(base.layers) != model.config.num_hidden_layers:
        return f"it has {len(base.layers)} layers, and its configuration says {model.config.num_hidden_layers}"
    if not all(_as_sized(model.config, layer) for layer in base.layers):
        return "some of its layers have other sizes than its configuration says"
    if not all(_alike(products) for layer in base.layers for products in linears(layer)):
        return "some of its layers are in other formats than those beside them"
    return ""


def _as_sized(config: PreTrainedConfig, layer: Any) -> bool:
    """Whether a layer's products take and give what the configuration, which may have been changed since, says."""
    dim, hidden = layer.self_attn.head_dim, config.hidden_size
    heads, keys, inner = config.num_attention_heads * dim, config.num_key_value_heads * dim, config.intermediate_size
    wanted = (
        (hidden, heads),
        (hidden, keys),
        (hidden, keys),
        (heads, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    )
    products = [product for together in linears(layer) for product in together]
    return all((it.in_features, it.out_features) == size for it, size in zip(products, wanted, strict=True))


def _alike(products: Sequence[Any]) -> bool:
    """Whether they can be one: narrow ones are left as they are where others are kept in few bits."""
    return len({getattr(product, "bits", None) for product in products}) == 1


def linears(layer: Any) -> tuple[tuple[Any, ...], ...]:
    """A layer's products; those in one tuple have the same input, and are computed as one."""
    a, m = layer.self_attn, layer.mlp
    return (a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (m.gate_proj, m.up_proj), (m.down_proj,)


def window(config: PreTrainedConfig, layer: int) -> int | None:
    """Tokens a row sees, itself included; None is all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return None if config.model_type == "llama" else getattr(config, "sliding_window", None)
