"""The lean decoder: a pass over the Llama family (llama, mistral, qwen2, qwen3) on packed weights and the SlotCache.

Owns its own forward pass and nothing else: a list of sub-layers, each of which adds to the residual stream, so that a
self-drafter is another list over the same cache. Knows nothing of requests, drafts or sampling.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedModel

from foredraft.models.attention import query_rows
from foredraft.models.base import NO_SKIP, Convert, SkipSet, unchanged
from foredraft.models.cache import GRANULE, LayerShape, SlotCache
from foredraft.models.decoder_layers import MLP, Attention, MakeLinear, Pass, RMSNorm, Rope, Sublayer, fused, sublayers
from foredraft.models.graphs import GraphPool
from foredraft.models.rows import SHORT_SPAN, Group, RowBatch, RowInvariance
from foredraft.weights.linear import LinearLayer, linear


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
        self.sublayers: list[Sublayer] = sublayers(base, config, make_linear, consume)
        self.norm = RMSNorm(base.norm.weight, base.norm.variance_epsilon, config.hidden_size)
        self.head: LinearLayer = fused([model.get_output_embeddings()], make_linear, consume=False)
        attentions = [s for s in self.sublayers if isinstance(s, Attention)]
        self.kv_heads = attentions[0].kv_heads
        self.fold = attentions[0].heads // self.kv_heads
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
        """Additive mask [count, 1, rows, key_length]: `width` rows for a prefill span, 1 for a single token, else
        `width * fold`; and those that `query_rows` adds, which see what the last one sees.
        """
        queries = positions[g.first_row : g.first_row + g.num_rows]
        if 1 < g.width <= SHORT_SPAN and self.fold > 1:
            queries = queries.unsqueeze(1).expand(-1, self.fold).reshape(-1)
        queries = queries.view(len(g.starts), 1, -1, 1)
        rows = queries.shape[2]
        missing = 0 if g.width == 1 else query_rows(rows, len(g.starts) * self.kv_heads) - rows
        if missing:
            queries = torch.cat((queries, queries[:, :, -1:].expand(-1, -1, missing, -1)), 2)
        keys = self.rope.positions[: g.key_length]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return torch.where(hidden, self.hidden, self.seen)
