"""What the lean decoder is made of: norms, rotary tables, attention and MLP, and how they are made of a model's own.

Each sub-layer adds to the residual stream of a pass's rows. Knows nothing of how a pass is planned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from foredraft.models.activations import by_rows
from foredraft.models.base import Convert, SkipSet
from foredraft.models.cache import SlotCache
from foredraft.models.family import window
from foredraft.models.rows import SHORT_SPAN, Group
from foredraft.weights.linear import LinearLayer
from foredraft.weights.stored import StoredLinear, fuse

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
            rows = g.width * fold
            q = q.transpose(1, 2).reshape(count, self.kv_heads, rows, self.head_dim)
            alone = rows == 1 and q.dtype != torch.float32  # a draft: the CPU is twice as fast on two rows
            q = torch.cat((q, q), 2) if alone else _padded(q, mask)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)[:, :, :rows]
            out = out.reshape(count, self.kv_heads, g.width, fold, self.head_dim).transpose(1, 2)
        else:  # [kv_heads, fold, width, head_dim]: a prefill span, whose mask would be large if it were folded
            q = q.view(g.width, self.kv_heads, fold, self.head_dim).permute(1, 2, 0, 3)
            keys, values = (t[0].unsqueeze(1).expand(-1, fold, -1, -1) for t in (keys, values))
            out = F.scaled_dot_product_attention(_padded(q, mask), keys, values, attn_mask=mask)
            out = out[:, :, : g.width].permute(2, 0, 1, 3)
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
        return self.down.add_to(x, by_rows(F.silu, gate).mul_(up))


Sublayer = Attention | MLP


def _padded(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Query rows, as many as their mask has: see `attention.query_rows`. A mask of one row is every row's."""
    missing = mask.shape[2] - q.shape[2]
    return F.pad(q, (0, 0, 0, missing)) if missing > 0 else q


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


def sublayers(base: Any, config: PreTrainedConfig, make_linear: MakeLinear, consume: bool) -> list[Sublayer]:
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
        qkv=fused([a.q_proj, a.k_proj, a.v_proj], make_linear, consume),
        out=fused([a.o_proj], make_linear, consume),
        head_norm=head_norm,
    )


def _mlp(index: int, layer: Any, config: PreTrainedConfig, make_linear: MakeLinear, consume: bool) -> MLP:
    norm = layer.post_attention_layernorm
    return MLP(
        layer=index,
        norm=RMSNorm(norm.weight, norm.variance_epsilon, config.hidden_size),
        gate_up=fused([layer.mlp.gate_proj, layer.mlp.up_proj], make_linear, consume),
        down=fused([layer.mlp.down_proj], make_linear, consume),
    )


def fused(parts: Sequence[Any], make_linear: MakeLinear, consume: bool) -> LinearLayer:
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
