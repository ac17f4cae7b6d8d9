"""What the native model is made of: a layer's norms and packed products, and how they are made of transformers' own.

Owns how a model's sizes are padded for the library. Knows nothing of passes or caches.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from foredraft.models.base import SkipSet
from foredraft.models.family import linears
from foredraft.native import library as native
from foredraft.native.library import BLOCK, Library
from foredraft.weights.memory import WeightMemory
from foredraft.weights.packed import Packed, Part, interleaved, of_stored, pack, round_up, stacked, vector
from foredraft.weights.stored import StoredLinear

WIDTH = 16  # heads are padded to a multiple of this


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One layer: its norms and packed products; None where a sub-layer is left out."""

    index: int
    window: int
    norms: list[torch.Tensor]  # of attention and MLP
    head_norms: list[torch.Tensor]  # of queries and keys, where the model has them
    qkv: Packed
    out: Packed
    gate_up: Packed
    down: Packed
    skip: tuple[bool, bool] = (False, False)  # of attention and MLP

    @property
    def products(self) -> tuple[Packed, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def without(self, skip: SkipSet) -> "Block":
        return replace(self, skip=(self.index in skip.attention, self.index in skip.mlp))

    def converted(self, convert: Callable[[Packed], Packed]) -> "Block":
        """With other products; one that is skipped stays as it is, for nobody computes it."""
        attention, mlp = ((lambda layer: layer) if skipped else convert for skipped in self.skip)
        return replace(
            self,
            qkv=attention(self.qkv),
            out=attention(self.out),
            gate_up=mlp(self.gate_up),
            down=mlp(self.down),
        )

    def struct(self) -> native.Layer:
        """For the library, as long as this object lives."""
        q, k = [norm.data_ptr() for norm in self.head_norms] or (None, None)
        attention, mlp = (norm.data_ptr() for norm in self.norms)
        products = (product.struct() for product in self.products)
        return native.Layer(attention, mlp, q, k, *products, self.window, *self.skip, self.index)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model; `dim` is the head size in memory."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def dim(self) -> int:
        return round_up(self.head_dim, WIDTH)

    @property
    def width(self) -> int:
        return round_up(self.hidden, BLOCK)


def head_norms(attention: Any) -> tuple[Any, ...]:
    return (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()


def block_of(
    library: Library, layer: Any, index: int, seen: int, sizes: Sizes, memory: WeightMemory, *, consume: bool
) -> Block:
    """A transformers layer packed; `seen`: the tokens of its window, 0 for all. `consume` empties what was packed."""
    s, a, m = sizes, layer.self_attn, layer.mlp
    qkv, out, gate_up, down = ([part_of(linear) for linear in products] for products in linears(layer))
    made = Block(
        index,
        seen,
        [vector(n.weight, s.width) for n in (layer.input_layernorm, layer.post_attention_layernorm)],
        [vector(n.weight, s.dim) for n in head_norms(a)],
        pack(library, stacked([_padded_heads(part, s) for part in qkv]), s.hidden, memory),
        pack(library, stacked([_padded_inputs(part, s) for part in out]), s.heads * s.dim, memory),
        pack(library, interleaved(*gate_up), s.hidden, memory),
        pack(library, stacked(down), m.down_proj.in_features, memory),
    )
    for linear in chain(*linears(layer)) if consume else ():
        _empty(linear)
    return made


def part_of(linear: Any) -> Part:
    return of_stored(linear) if isinstance(linear, StoredLinear) else Part(linear.weight.detach(), linear.bias)


def _empty(linear: Any) -> None:
    """Let go of a packed layer's own weights."""
    if isinstance(linear, StoredLinear):
        linear.empty()
    else:
        linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)


def _padded_heads(part: Part, sizes: Sizes) -> Part:
    """Each head's outputs with zeros up to `dim`."""
    if sizes.dim == sizes.head_dim:
        return part
    more = (0, sizes.dim - sizes.head_dim)
    weight = F.pad(part.weight.unflatten(0, (-1, sizes.head_dim)), (0, 0, *more)).flatten(0, 1)
    bias = None if part.bias is None else F.pad(part.bias.detach().view(-1, sizes.head_dim), more).flatten()
    return Part(weight, bias)


def _padded_inputs(part: Part, sizes: Sizes) -> Part:
    """The same of a layer's inputs."""
    if sizes.dim == sizes.head_dim:
        return part
    heads = part.weight.unflatten(1, (-1, sizes.head_dim))
    return Part(F.pad(heads, (0, sizes.dim - sizes.head_dim)).flatten(1), part.bias)
