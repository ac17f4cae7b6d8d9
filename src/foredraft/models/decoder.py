"""The lean decoder: the Llama family (llama, mistral, qwen2, qwen3) on packed weights and the SlotCache.

Owns its own forward pass and nothing else: a list of sub-layers, each of which adds to the residual stream, so that a
self-drafter is another list over the same cache. Knows nothing of requests, drafts or sampling.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from foredraft.models.base import NO_SKIP, Convert, SkipSet, unchanged
from foredraft.models.cache import GRANULE, LayerShape, SlotCache
from foredraft.models.graphs import GraphPool
from foredraft.models.rows import SHORT_SPAN, Group, RowBatch, RowInvariance
from foredraft.upstream.modules import is_patched
from foredraft.weights.linear import LinearLayer, linear
from foredraft.weights.stored import StoredLinear, fuse

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


MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], LinearLayer]


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, as one norm and two products."""

    def __init__(self, weight: torch.Tensor, eps: float, size: int) -> None:
        self.weight = weight.detach().float() * size**0.5
        self.floor = torch.tensor((eps * size) ** 0.5, dtype=torch.float32, device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        return torch.div(x * self.weight, torch.hypot(length, self.floor), out=torch.empty_like(x))


@dataclass(slots=True)
class Pass:
    """What every sub-layer of one forward needs; N rows."""

    cache: SlotCache
    index: torch.Tensor  # [N] slot * length + position
    cos: torch.Tensor  # [N, 1, head_dim]
    sin: torch.Tensor  # [N, 1, head_dim], its first half negated
    groups: tuple[Group, ...]
    masks: dict[int | None, list[torch.Tensor]]  # by window, one for each group


@dataclass(slots=True)
class Attention:
    """x + o(attention(norm(x))); grouped queries are folded into rows, which is what the CPU kernel likes."""

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    norm: RMSNorm
    qkv: LinearLayer
    out: LinearLayer
    head_norm: RMSNorm | None = None

    def converted(self, convert: Convert) -> "Attention":
        return replace(self, qkv=convert(self.qkv), out=convert(self.out))

    def skipped(self, skip: SkipSet) -> bool:
        return self.layer in skip.attention

    def __call__(self, x: torch.Tensor, p: Pass) -> torch.Tensor:
        rows, both = x.shape[0], self.heads + self.kv_heads
        qkv = self.qkv.forward(self.norm(x))
        heads = qkv.view(rows, both + self.kv_heads, self.head_dim)
        qk = heads[:, :both]
        if self.head_norm is not None:
            qk.copy_(self.head_norm(qk))
        turned = qk.roll(self.head_dim // 2, -1)
        qk.mul_(p.cos).addcmul_(turned, p.sin)
        p.cache.write(self.layer, p.index, qkv[:, self.heads * self.head_dim :])
        return self.out.add_to(x, self._attend(heads[:, : self.heads], p))

    def _attend(self, q: torch.Tensor, p: Pass) -> torch.Tensor:
        masks = p.masks[self.window]
        if len(p.groups) == 1:
            return self._group(q, p.groups[0], masks[0], p)
        parts = [
            self._group(q[g.first_row : g.first_row + g.num_rows], g, mask, p)
            for g, mask in zip(p.groups, masks, strict=True)
        ]
        return torch.cat(parts)

    def _group(self, q: torch.Tensor, g: Group, mask: torch.Tensor, p: Pass) -> torch.Tensor:
        count, fold = len(g.starts), self.heads // self.kv_heads
        keys, values = p.cache.views(g.first_slot, count, g.key_length)[self.layer]
        q = q.reshape(count, g.width, self.kv_heads, fold, self.head_dim)
        if g.width <= SHORT_SPAN:  # [count, kv_heads, width * fold, head_dim]
            q = q.transpose(1, 2).reshape(count, self.kv_heads, g.width * fold, self.head_dim)
            alone = q.shape[2] == 1 and q.dtype != torch.float32  # a draft: the CPU is twice as fast on two rows
            out = F.scaled_dot_product_attention(torch.cat((q, q), 2) if alone else q, keys, values, attn_mask=mask)
            out = out[:, :, :1] if alone else out
            out = out.reshape(count, self.kv_heads, g.width, fold, self.head_dim).transpose(1, 2)
        else:  # [kv_heads, fold, width, head_dim]: a prefill span, whose mask would be large if it were folded
            q = q.view(g.width, self.kv_heads, fold, self.head_dim).permute(1, 2, 0, 3)
            keys, values = (t[0].unsqueeze(1).expand(-1, fold, -1, -1) for t in (keys, values))
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).permute(2, 0, 1, 3)
        return out.reshape(g.num_rows, self.heads * self.head_dim)


@dataclass(slots=True)
class MLP:
    """x + down(silu(gate(norm(x))) * up(norm(x)))."""

    layer: int
    norm: RMSNorm
    gate_up: LinearLayer
    down: LinearLayer

    def converted(self, convert: Convert) -> "MLP":
        return replace(self, gate_up=convert(self.gate_up), down=convert(self.down))

    def skipped(self, skip: SkipSet) -> bool:
        return self.layer in skip.mlp

    def __call__(self, x: torch.Tensor, p: Pass) -> torch.Tensor:
        gate, up = self.gate_up.forward(self.norm(x)).chunk(2, -1)
        return self.down.add_to(x, F.silu(gate).mul_(up))


Sublayer = Attention | MLP


class Decoder:
    """A Llama-family model as a list of sub-layers over one SlotCache."""

    def __init__(self, model: PreTrainedModel, make_linear: MakeLinear = linear, *, consume: bool = False) -> None:
        """Take over a loaded model's weights; `consume` empties each of its layers once it is packed."""
        config = model.config
        base = model.get_decoder()
        self.config = config
        self.generation_config: GenerationConfig | None = model.generation_config
        self.device = model.device
        self.dtype = model.dtype
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_position_embeddings
        self.num_layers: int = config.num_hidden_layers
        self.row_invariance = RowInvariance()
        self.embedding = base.embed_tokens.weight.detach()
        self.rope = Rope(base.rotary_emb, self.dtype)
        self.sublayers: list[Sublayer] = _sublayers(base, config, make_linear, consume)
        self.norm = RMSNorm(base.norm.weight, base.norm.variance_epsilon, config.hidden_size)
        self.head: LinearLayer = _fused([model.get_output_embeddings()], make_linear, consume=False)
        attentions = [s for s in self.sublayers if isinstance(s, Attention)]
        self.fold = attentions[0].heads // attentions[0].kv_heads
        self.windows = {s.window for s in attentions}
        self.seen, self.hidden = torch.tensor((0.0, -torch.inf), dtype=self.dtype, device=self.device).unbind()
        self.graphs = GraphPool() if self.device.type == "cuda" else None
        shapes = [LayerShape(s.kv_heads, s.head_dim, s.head_dim) for s in attentions]
        self.cache = SlotCache(shapes, dtype=self.dtype, devices=[self.device] * len(shapes))

    @property
    def weight_bytes(self) -> int:
        layers = [self.head]
        for s in self.sublayers:
            layers += [s.qkv, s.out] if isinstance(s, Attention) else [s.gate_up, s.down]
        table: int = self.embedding.numel() * self.embedding.element_size()
        return table + sum(layer.nbytes for layer in layers)

    def variant(self, convert: Convert = unchanged, skip: SkipSet = NO_SKIP) -> "Decoder":
        """This model as another list of sub-layers over the same cache; see `CausalModel.variant`."""
        skip.check(self.num_layers)
        other = copy.copy(self)
        other.sublayers = [s.converted(convert) for s in self.sublayers if not s.skipped(skip)]
        other.head = convert(self.head)
        other.graphs = None if self.graphs is None else GraphPool()
        return other

    def weight_sample(self) -> list[torch.Tensor]:
        """The table, and one weight each of the first, middle and last layer."""
        mlps = [s for s in self.sublayers if isinstance(s, MLP)]
        return [self.embedding, *(mlps[i].down.dense() for i in (0, len(mlps) // 2, -1))]

    @torch.inference_mode()
    def forward(self, rows: RowBatch) -> torch.Tensor:
        """Write the rows' keys and values into the cache; return logits [R, V] of the wanted rows."""
        self._reserve(rows.groups)
        inputs = torch.tensor((rows.tokens, rows.positions, rows.slots), device=self.device)
        if self.graphs is None and rows.wanted == list(range(len(rows.tokens))):
            return self._body(rows.groups, inputs)
        wanted = self._wanted(rows)
        if self.graphs is None or rows.groups[0].width > SHORT_SPAN or not rows.wanted:
            return self._body(rows.groups, inputs, wanted)[: len(rows.wanted)]
        groups = tuple(g.at_key_length(self._graph_length(g)) for g in rows.groups)
        self._reserve(groups)
        shapes = tuple((g.first_slot, g.width, len(g.starts), g.key_length) for g in groups)
        key = (shapes, self.cache.generation, len(self.rope.table), len(wanted))
        return self.graphs.run(key, partial(self._body, groups), inputs, wanted)[: len(rows.wanted)]

    def _reserve(self, groups: tuple[Group, ...]) -> None:
        """Room in the cache and in the tables for what these groups see."""
        for g in groups:
            self.cache.extend(g.first_slot, len(g.starts), g.key_length)
        self.rope.reserve(max([g.key_length for g in groups]), self.device)

    def _graph_length(self, g: Group) -> int:
        """Keys of a captured pass: doubling from 512, so that few graphs serve a growing text."""
        length = GRANULE
        while length < g.key_length:
            length *= 2
        return length

    def _wanted(self, rows: RowBatch) -> torch.Tensor:
        """Rows that go through the head: the wanted ones, the last of them repeated until there are `min_rows`."""
        padding = min(self.row_invariance.min_rows, len(rows.tokens)) - len(rows.wanted)
        padded = [*rows.wanted, *rows.wanted[-1:] * padding]
        return torch.tensor(padded, dtype=torch.int64, device=self.device)

    def _body(
        self, groups: tuple[Group, ...], inputs: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """inputs [3, N]: token ids, positions, slots; wanted [R], or all rows. Tensors alone: it can be a graph."""
        tokens, positions, slots = inputs.unbind()
        p = self._pass(groups, positions, slots)
        x = F.embedding(tokens, self.embedding)
        for sublayer in self.sublayers:
            x = sublayer(x, p)
        if wanted is not None:
            if not len(wanted):
                return x.new_empty(0, self.vocab_size)
            x = x.index_select(0, wanted)
        return self.head.forward(self.norm(x))

    def _pass(self, groups: tuple[Group, ...], positions: torch.Tensor, slots: torch.Tensor) -> Pass:
        index = torch.add(positions, slots, alpha=self.cache.length)
        cos, sin = self.rope.at(positions)
        masks = {window: [self._mask(positions, g, window) for g in groups] for window in self.windows}
        return Pass(self.cache, index, cos, sin, groups, masks)

    def _mask(self, positions: torch.Tensor, g: Group, window: int | None) -> torch.Tensor:
        """Additive mask [count, 1, width * fold, key_length]; `width` rows for a prefill span, 1 for a single token."""
        queries = positions[g.first_row : g.first_row + g.num_rows]
        if 1 < g.width <= SHORT_SPAN and self.fold > 1:
            queries = queries.unsqueeze(1).expand(-1, self.fold).reshape(-1)
        queries = queries.view(len(g.starts), 1, -1, 1)
        keys = self.rope.positions[: g.key_length]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return torch.where(hidden, self.hidden, self.seen)


class Rope:
    """Cosines and sines of rotary positions, tabled on demand with the model's own module (its scaling included)."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module = module
        self.dtype = dtype
        self.positions = torch.empty(0, dtype=torch.int64)
        self.table = torch.empty(0, 2, 1, 0)  # [length, 2, 1, head_dim]

    def reserve(self, length: int, device: torch.device) -> None:
        if length <= len(self.table):
            return
        length = max(length, 2 * len(self.table), 1024)
        probe = torch.empty(1, 1, 1, dtype=self.dtype, device=device)
        self.positions = torch.arange(length, device=device)
        cos, sin = self.module(probe, self.positions[None])
        half = sin.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        self.table = torch.stack((cos[0], sin[0]), 1).unsqueeze(2)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(cos, sin) [N, 1, head_dim]; sin's first half is negated, so that rotate_half becomes a roll."""
        return self.table.index_select(0, positions).unbind(1)


def _sublayers(base: Any, config: PreTrainedConfig, make_linear: MakeLinear, consume: bool) -> list[Sublayer]:
    made: list[Sublayer] = []
    for index, layer in enumerate(base.layers):
        made.append(_attention(index, layer, config, make_linear, consume))
        made.append(_mlp(index, layer, config, make_linear, consume))
    return made


def _attention(index: int, layer: Any, config: PreTrainedConfig, make_linear: MakeLinear, consume: bool) -> Attention:
    a = layer.self_attn
    heads, dim = config.num_attention_heads, a.head_dim
    kv_heads = config.num_key_value_heads
    head_norm = None
    if hasattr(a, "q_norm"):
        weight = torch.cat((a.q_norm.weight.expand(heads, -1), a.k_norm.weight.expand(kv_heads, -1)))
        head_norm = RMSNorm(weight, a.q_norm.variance_epsilon, dim)
    return Attention(
        layer=index,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        window=window(config, index),
        norm=RMSNorm(layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon, config.hidden_size),
        qkv=_fused([a.q_proj, a.k_proj, a.v_proj], make_linear, consume),
        out=_fused([a.o_proj], make_linear, consume),
        head_norm=head_norm,
    )


def _mlp(index: int, layer: Any, config: PreTrainedConfig, make_linear: MakeLinear, consume: bool) -> MLP:
    norm = layer.post_attention_layernorm
    return MLP(
        layer=index,
        norm=RMSNorm(norm.weight, norm.variance_epsilon, config.hidden_size),
        gate_up=_fused([layer.mlp.gate_proj, layer.mlp.up_proj], make_linear, consume),
        down=_fused([layer.mlp.down_proj], make_linear, consume),
    )


def window(config: PreTrainedConfig, layer: int) -> int | None:
    """Tokens a row sees, itself included; None is all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return None if config.model_type == "llama" else getattr(config, "sliding_window", None)


def _fused(parts: Sequence[Any], make_linear: MakeLinear, consume: bool) -> LinearLayer:
    """One layer for several over the same input; layers stored in few bits keep their format."""
    stored = [part for part in parts if isinstance(part, StoredLinear)]
    if stored:
        return fuse(stored, consume=consume)
    weight = torch.cat([part.weight for part in parts]) if len(parts) > 1 else parts[0].weight
    biases: list[torch.Tensor] = [part.bias for part in parts if part.bias is not None]
    if biases and len(biases) < len(parts):
        biases = [p.bias if p.bias is not None else p.weight.new_zeros(p.out_features) for p in parts]
    made = make_linear(weight.detach(), torch.cat(biases).detach() if biases else None)
    for part in parts if consume else ():
        part.weight = nn.Parameter(part.weight.new_empty(0), requires_grad=False)
    return made
