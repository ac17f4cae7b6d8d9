"""The native model: the Llama family on the C library, a whole pass in one call. Exact by construction.

Owns the weights in the library's layout and the call; a self-draft is another list of layers over the same weights and
cache. Knows nothing of requests, drafts or sampling.
"""

import copy
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from foredraft.errors import ModelError
from foredraft.models import decoder
from foredraft.models.base import NO_SKIP, Convert, Guessing, SkipSet, unchanged
from foredraft.models.calls import Call, Rope
from foredraft.models.pages import PageCache, PageShape
from foredraft.models.rows import RowBatch, RowInvariance, Span
from foredraft.native import library as native
from foredraft.native.library import BLOCK, MOST_DIM, Library
from foredraft.policy import StopRule
from foredraft.weights.packed import (
    FORMATS,
    Packed,
    Part,
    interleaved,
    of_stored,
    pack,
    quantized,
    round_up,
    stacked,
    vector,
)
from foredraft.weights.quantize import Quantizer, for_drafting
from foredraft.weights.stored import StoredLinear

EXACT = RowInvariance(min_rows=1, key_multiple=1, row_multiple=1, max_rows=129, exact=True, prefill=True)
WIDTH = 16  # heads are padded to a multiple of this


def why_not(model: PreTrainedModel) -> str:
    """Why no library of ours computes what this model computes; empty where one does."""
    config = model.config
    if not decoder.supports(model):
        return f"it computes the published {', '.join(decoder.FAMILY)} models, and this {config.model_type} is none"
    if model.device.type != "cpu" or model.dtype not in FORMATS:
        return f"it computes in float32 and bfloat16 on a CPU, and this model is {model.dtype} on {model.device}"
    if _head_dim(model) > MOST_DIM or _head_dim(model) % 2:
        return f"it takes even head sizes up to {MOST_DIM}, and this model's is {_head_dim(model)}"
    if len({norm.variance_epsilon for norm in _norms(model.get_decoder())}) > 1:
        return "its norms have several epsilons"
    layers = [linears for layer in model.get_decoder().layers for linears in _linears(layer)]
    formats = [{_bits(linear) for linear in linears} for linears in (*layers, (model.get_output_embeddings(),))]
    if any(len(bits) > 1 or None in bits for bits in formats):
        return "some of its layers are neither plain nor in four or eight bits, or unlike those beside them"
    if _head_dim(model) % WIDTH and any(bits != {0} for bits in formats):
        return f"in few bits it takes head sizes that are multiples of {WIDTH}, and this model's is {_head_dim(model)}"
    return ""


def _bits(linear: Any) -> int | None:
    """Of a stored layer; 0 for a plain one, None for any other."""
    if isinstance(linear, StoredLinear):
        return linear.bits
    return 0 if isinstance(linear, nn.Linear) else None


def _linears(layer: Any) -> tuple[tuple[Any, ...], ...]:
    """A layer's products; those in one tuple have the same input, and are computed as one."""
    a, m = layer.self_attn, layer.mlp
    return (a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (m.gate_proj, m.up_proj), (m.down_proj,)


def _norms(base: Any) -> list[Any]:
    """All of them; those of queries and keys too, where there are any."""
    each = [(n.input_layernorm, n.post_attention_layernorm, *_head_norms(n.self_attn)) for n in base.layers]
    return [base.norm, *(norm for norms in each for norm in norms)]


def _head_norms(attention: Any) -> tuple[Any, ...]:
    return (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()


def _head_dim(model: PreTrainedModel) -> int:
    return int(model.get_decoder().layers[0].self_attn.head_dim)


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


class NativeModel:
    """A Llama-family model in the native library, over one PageCache."""

    runtime = "native"

    def __init__(
        self, model: PreTrainedModel, library: Library, *, isa: str | None = None, consume: bool = False
    ) -> None:
        """Take over a loaded model's weights; `consume` empties each of its layers once it is packed."""
        config, base = model.config, model.get_decoder()
        self.library = library
        self.isa = library.isa(isa)
        self.config: PreTrainedConfig = config
        self.generation_config: GenerationConfig | None = model.generation_config
        self.device = model.device
        self.dtype = model.dtype
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_position_embeddings
        self.num_layers: int = config.num_hidden_layers
        self.row_invariance = EXACT
        self.sizes = Sizes(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, _head_dim(model))
        self.eps: float = base.norm.variance_epsilon
        self.embedding = base.embed_tokens.weight.detach().contiguous()
        self.norm = vector(base.norm.weight, self.sizes.width)
        self.blocks = [self._block(i, layer, consume) for i, layer in enumerate(base.layers)]
        self.head = pack(library, stacked([_part(model.get_output_embeddings())]), self.sizes.hidden)
        self.rope = Rope(base.rotary_emb)
        s = self.sizes
        self.cache = PageCache(PageShape(self.num_layers, s.kv_heads, s.dim, self.dtype))
        self.call = self.prepared()

    def _block(self, index: int, layer: Any, consume: bool) -> Block:
        s, a, m = self.sizes, layer.self_attn, layer.mlp
        qkv, out, gate_up, down = ([_part(linear) for linear in linears] for linears in _linears(layer))
        made = Block(
            index,
            decoder.window(self.config, index) or 0,
            [vector(n.weight, s.width) for n in (layer.input_layernorm, layer.post_attention_layernorm)],
            [vector(n.weight, s.dim) for n in _head_norms(a)],
            pack(self.library, stacked([_padded_heads(part, s) for part in qkv]), s.hidden),
            pack(self.library, stacked([_padded_inputs(part, s) for part in out]), s.heads * s.dim),
            pack(self.library, interleaved(*gate_up), s.hidden),
            pack(self.library, stacked(down), m.down_proj.in_features),
        )
        for linear in chain(*_linears(layer)) if consume else ():
            _empty(linear)
        return made

    def prepared(self) -> Call:
        """The call of a pass over its blocks as they are now."""
        s = self.sizes
        layers = (native.Layer * len(self.blocks))(*(block.struct() for block in self.blocks))
        struct = native.Model(
            len(self.blocks), s.hidden, self.vocab_size, s.heads, s.kv_heads, s.head_dim, s.dim,
            FORMATS[self.dtype], self.isa, self.eps, self.embedding.data_ptr(), layers,
            self.norm.data_ptr(), self.head.struct(),
        )  # fmt: skip
        return Call(self.library, struct, self.rope)

    @property
    def instructions(self) -> str:
        """The instruction set that its kernels use."""
        return native.ISAS[self.isa]

    @property
    def products(self) -> list[Packed]:
        return [self.head, *(product for block in self.blocks for product in block.products)]

    @property
    def kernels(self) -> dict[str, int]:
        """How many products there are of each format."""
        return dict(Counter(product.form.name.lower() for product in self.products))

    @property
    def weight_bytes(self) -> int:
        return int(self.embedding.nbytes) + sum(product.nbytes for product in self.products)

    def variant(self, convert: Convert = unchanged, skip: SkipSet = NO_SKIP) -> "NativeModel":
        """This model with other layers over the same cache; see `CausalModel.variant`."""
        skip.check(self.num_layers)
        other = copy.copy(self)
        other.blocks = [block.without(skip) for block in self.blocks]
        if isinstance(convert, Quantizer):
            other.blocks = [
                block.converted(partial(quantized, self.library, quantizer=convert)) for block in other.blocks
            ]
            other.head = quantized(self.library, self.head, convert)
        elif convert not in (unchanged, for_drafting):  # a draft model's own weights are as fast as any
            raise ModelError(f"the native runtime cannot convert its layers by {convert!r}; use runtime='torch'")
        other.call = other.prepared()
        return other

    def weight_sample(self) -> list[torch.Tensor]:
        """The table, and one weight each of the first, middle and last layer."""
        hidden, inputs = self.sizes.hidden, self.config.intermediate_size
        chosen = [self.blocks[i] for i in (0, len(self.blocks) // 2, -1)]
        return [self.embedding, *(block.down.dense()[:hidden, :inputs] for block in chosen)]

    def forward(self, rows: RowBatch) -> torch.Tensor:
        """Write the rows' keys and values into the cache; return logits [R, V] float32 of the wanted rows."""
        spans: list[int] = []
        for first_slot, _, width, starts, _ in rows.groups:
            for slot, start in enumerate(starts, first_slot):
                end = start + width
                self.cache.extend(slot, start, end)
                spans += (slot, start, width)
                if end > self.call.length:
                    self._lengthen(end)
        logits = torch.empty(len(rows.wanted), self.vocab_size, dtype=torch.float32)
        self.call(array("i", rows.tokens + spans + rows.wanted), rows, len(spans) // 3, self.cache, logits)
        return logits

    def chain(
        self, spans: list[Span], guessing: list[Guessing], rule: StopRule, vocab_size: int
    ) -> list[tuple[list[int], list[float]]]:
        """See `Chains`."""
        for span, (_, _, limit) in zip(spans, guessing, strict=True):
            end = span.start + len(span.tokens) + limit - 1
            self.cache.extend(span.slot, span.start, end)
            if end > self.call.length:
                self._lengthen(end)
        return self.call.chain(spans, guessing, rule, min(vocab_size, self.vocab_size), self.cache)

    def _lengthen(self, length: int) -> None:
        self.rope.reserve(length)
        self.call.point_to(self.rope)


def _part(linear: Any) -> Part:
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
