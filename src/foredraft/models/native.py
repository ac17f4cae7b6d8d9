"""The native model: the Llama family on the C library, a whole pass in one call. Exact by construction.

Owns the weights in the library's layout and the call; a self-draft is another list of layers over the same weights and
cache. Knows nothing of requests, drafts or sampling.
"""

import copy
from array import array
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from foredraft.errors import ModelError
from foredraft.models.base import NO_SKIP, Convert, Guessing, SkipSet, unchanged
from foredraft.models.calls import Call, Rope
from foredraft.models.family import FAMILY, linears, oddity, supports, window
from foredraft.models.native_layers import WIDTH, Sizes, block_of, head_norms, part_of
from foredraft.models.pages import PageCache, PageShape
from foredraft.models.rows import RowBatch, RowInvariance, Span
from foredraft.native import library as native
from foredraft.native.library import MOST_DIM, Library
from foredraft.policy import StopRule
from foredraft.weights.memory import WeightMemory
from foredraft.weights.packed import FORMATS, Packed, pack, quantized, stacked, vector
from foredraft.weights.quantize import ForDrafting, Quantizer
from foredraft.weights.stored import StoredLinear

EXACT = RowInvariance(min_rows=1, key_multiple=1, row_multiple=1, max_rows=129, exact=True, prefill=True)


def why_not(model: PreTrainedModel) -> str:
    """Why no library of ours computes what this model computes; empty where one does."""
    config = model.config
    if not supports(model):
        return f"it computes the published {', '.join(FAMILY)} models, and this {config.model_type} is none"
    if model.device.type != "cpu" or model.dtype not in FORMATS:
        return f"it computes in float32 and bfloat16 on a CPU, and this model is {model.dtype} on {model.device}"
    if _head_dim(model) > MOST_DIM or _head_dim(model) % 2:
        return f"it takes even head sizes up to {MOST_DIM}, and this model's is {_head_dim(model)}"
    if oddity(model):
        return oddity(model)
    if len({norm.variance_epsilon for norm in _norms(model.get_decoder())}) > 1:
        return "its norms have several epsilons"
    layers = [products for layer in model.get_decoder().layers for products in linears(layer)]
    formats = [{_bits(linear) for linear in products} for products in (*layers, (model.get_output_embeddings(),))]
    if any(None in bits for bits in formats):
        return "some of its layers are neither plain nor in four or eight bits"
    if _head_dim(model) % WIDTH and any(bits != {0} for bits in formats):
        return f"in few bits it takes head sizes that are multiples of {WIDTH}, and this model's is {_head_dim(model)}"
    return ""


def _bits(linear: Any) -> int | None:
    """Of a stored layer; 0 for a plain one, None for any other."""
    if isinstance(linear, StoredLinear):
        return linear.bits
    return 0 if isinstance(linear, nn.Linear) else None


def _norms(base: Any) -> list[Any]:
    """All of them; those of queries and keys too, where there are any."""
    each = [(n.input_layernorm, n.post_attention_layernorm, *head_norms(n.self_attn)) for n in base.layers]
    return [base.norm, *(norm for norms in each for norm in norms)]


def _head_dim(model: PreTrainedModel) -> int:
    return int(model.get_decoder().layers[0].self_attn.head_dim)


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
        memory = WeightMemory()
        self.blocks = [
            block_of(library, layer, i, window(config, i) or 0, self.sizes, memory, consume=consume)
            for i, layer in enumerate(base.layers)
        ]
        self.head = pack(library, stacked([part_of(model.get_output_embeddings())]), self.sizes.hidden, memory)
        self.rope = Rope(base.rotary_emb)
        s = self.sizes
        self.cache = PageCache(PageShape(self.num_layers, s.kv_heads, s.dim, self.dtype))
        self.call = self.prepared()

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
        if isinstance(convert, ForDrafting):
            convert = Quantizer(convert.weight_format)
        if isinstance(convert, Quantizer):
            rounded = partial(quantized, self.library, quantizer=convert, memory=WeightMemory())
            other.blocks = [block.converted(rounded) for block in other.blocks]
            other.head = rounded(self.head)
        elif convert is not unchanged:
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
        for span, guess in zip(spans, guessing, strict=True):
            end = span.start + len(span.tokens) + guess.limit - 1
            self.cache.extend(span.slot, span.start, end)
            if end > self.call.length:
                self._lengthen(end)
        return self.call.chain(spans, guessing, rule, min(vocab_size, self.vocab_size), self.cache)

    def _lengthen(self, length: int) -> None:
        self.rope.reserve(length)
        self.call.point_to(self.rope)
