"""HFModel: any transformers causal language model behind the CausalModel protocol.

Their modules compute; keys and values live in our SlotCache, the masks and positions are ours, and a group of spans is
one call. Knows no architecture beyond the few table entries below and in support.py.
"""

import copy
import inspect
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel

from foredraft.errors import UnsupportedModelError
from foredraft.models import attention, sublayers
from foredraft.models.activations import all_by_rows
from foredraft.models.base import NO_SKIP, Convert, SkipSet, unchanged
from foredraft.models.cache import LayerShape, SlotCache
from foredraft.models.experts import pack_experts, pad_routers
from foredraft.models.options import configured_length
from foredraft.models.rows import Group, RowBatch, RowInvariance, Span, plan
from foredraft.models.support import ADVICE
from foredraft.upstream.attention import use_attention
from foredraft.upstream.caches import CacheView, cache_argument, written_layers
from foredraft.upstream.rope import pin_rope
from foredraft.weights.linear import PackedLinear, PlainLinear, pack_linears
from foredraft.weights.quantize import QuantLinear, dense, is_linear

ALIBI = {"bloom", "falcon"}  # their position biases are built from a 2-D mask: a call serves one sequence
BROADCAST = {"falcon"}  # their code may give torch one key head for all queries, which no fused kernel takes
NO_LIMIT = 32768  # positions of a model whose configuration sets no limit
PADDING = 7  # rows by which a span alone is padded at most


class SlotView(CacheView):
    """The SlotCache as transformers' modules see it in one call: the rows of one group."""

    def __init__(
        self, cache: SlotCache, group: Group, position: int | torch.Tensor, index: torch.Tensor, heads: int = -1
    ) -> None:
        """Key heads are repeated up to `heads`; -1 leaves them as they are."""
        super().__init__(group.starts[0], position, group.key_length)
        self._heads = heads
        self._cache = cache
        self._indices = {index.device: index}
        self._views = cache.views(group.first_slot, len(group.starts), group.key_length)

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [B, H, W, D]; return all of the group's, [B, H or heads, K, D], without a copy."""
        device = keys.device
        if device not in self._indices:
            self._indices[device] = next(iter(self._indices.values())).to(device)
        rows = torch.cat([keys.transpose(1, 2).flatten(2), values.transpose(1, 2).flatten(2)], -1)
        self._cache.write(layer, self._indices[device], rows.flatten(0, 1).to(self._cache.dtype))
        keys, values = self._views[layer]
        return keys.expand(-1, self._heads, -1, -1), values.expand(-1, self._heads, -1, -1)


class HFModel:
    """A loaded transformers model, which is ours: it is changed in place (packed weights, attention function).

    Raises:
        UnsupportedModelError: its state cannot be rewound, it is not causal, or it does not compute through us what it
            computes by itself.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        _own_config(model)
        self.config = model.config
        self.generation_config: GenerationConfig | None = model.generation_config
        self.model = model.eval()
        self.dtype = model.dtype
        self.device: torch.device = _embedding(model).device
        self._positions, text = _positions(model)
        self.max_positions = min(text, pin_rope(model))
        self.num_layers: int = self.config.get_text_config(decoder=True).num_hidden_layers
        self.row_invariance = RowInvariance()
        self._heads: int = self.config.num_attention_heads if self.config.model_type in BROADCAST else -1
        self._arity: dict[int, int] = {}  # of what sub-layers return, once a variant has asked
        parameters = inspect.signature(model.forward).parameters
        self._cache_argument = cache_argument(model) or "past_key_values"
        self._takes = {name for name in ("position_ids", "logits_to_keep") if name in parameters}
        self._alone = "position_ids" not in parameters or bool(getattr(self.config, "alibi", _is_alibi(model)))
        self._builds_masks = self._alone
        sample = _sample(model, self.max_positions)
        self.cache, expected = self._dry_run(sample)
        self.vocab_size = expected.shape[-1]
        self._optimise()
        self._check(sample, expected)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights a pass reads."""
        packed = sum(m.nbytes for m in self.model.modules() if isinstance(m, PackedLinear | PlainLinear | QuantLinear))
        unpacked: int = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return packed + unpacked

    def variant(self, convert: Convert = unchanged, skip: SkipSet = NO_SKIP) -> "HFModel":
        """This model as another tree of modules over the same cache; see `CausalModel.variant`."""
        skip.check(self.num_layers)
        stand_ins: dict[int, nn.Module] = {}
        if skip:
            layers = sublayers.find_layers(self.model, self.num_layers)
            self._check_skippable(layers)
            stand_ins = sublayers.stand_ins(layers, skip, self._arity)
        return self._over(sublayers.rebuilt(self.model, convert, stand_ins))

    def _over(self, model: PreTrainedModel, cache: SlotCache | None = None) -> "HFModel":
        other = copy.copy(self)
        other.model, other.cache = model, cache or self.cache
        return other

    def _check_skippable(self, layers: list[sublayers.Layer]) -> None:
        """Raise ModelError unless skipped sub-layers leave the residual stream alone; asked once, on a cache apart."""
        if self._arity:
            return
        cache = SlotCache(self.cache.layers, dtype=self.cache.dtype, devices=self.cache.devices)
        rows = plan([Span(0, 0, _sample(self.model, self.max_positions))], 4, 128)
        arity = sublayers.output_arity(layers, lambda: self._over(self.model, cache).forward(rows))
        everything = SkipSet(tuple(range(self.num_layers)), tuple(range(self.num_layers)))
        bare = sublayers.rebuilt(self.model, unchanged, sublayers.stand_ins(layers, everything, arity))
        empty = [layer.whole for layer in sublayers.find_layers(bare, self.num_layers)]
        sublayers.check_identity(empty, lambda: self._over(bare, cache).forward(rows), self.config.model_type)
        self._arity.update(arity)

    def weight_sample(self) -> list[torch.Tensor]:
        """The table, and the first, middle and last weight of all linear layers."""
        linears = [module for module in self.model.modules() if is_linear(module)]
        return [_embedding(self.model).detach(), *(dense(linears[i]) for i in (0, len(linears) // 2, -1))]

    @torch.inference_mode()
    def forward(self, rows: RowBatch) -> torch.Tensor:
        """Write the rows' keys and values into the cache; return logits [R, V] of the wanted rows."""
        for group in rows.groups:
            self.cache.extend(group.first_slot, len(group.starts), group.key_length)
        wanted = set(rows.wanted)
        kept: list[int] = []
        parts = []
        for group in self._calls(rows):
            keep = _kept_rows(group, wanted, self.row_invariance.min_rows)
            parts.append(self._call(rows, group, keep))
            kept += keep
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        if kept == rows.wanted:
            return logits
        place = {row: i for i, row in enumerate(kept)}
        return logits[torch.tensor([place[row] for row in rows.wanted], dtype=torch.long, device=logits.device)]

    def _calls(self, rows: RowBatch) -> Iterator[Group]:
        """The groups; single spans where the model takes no positions of ours, padded as far as it has some."""
        if not self._alone:
            yield from rows.groups
            return
        multiple = self.row_invariance.row_multiple
        for group in rows.groups:
            for i, start in enumerate(group.starts):
                slot, first_row = group.first_slot + i, group.first_row + i * group.width
                width = min(group.width, (self._positions - start) // multiple * multiple)
                yield group._replace(first_slot=slot, first_row=first_row, width=width, starts=(start,))

    def _call(self, rows: RowBatch, group: Group, keep: list[int]) -> torch.Tensor:
        """Logits [len(keep), V] of one group."""
        shape = (len(group.starts), group.width)
        span = slice(group.first_row, group.first_row + group.num_rows)
        positions = torch.tensor(rows.positions[span], device=self.device)
        index = positions + torch.tensor(rows.slots[span], device=self.device) * self.cache.length
        starts = group.starts[0] if self._alone else torch.tensor(group.starts, device=self.device)
        places = [divmod(row - group.first_row, group.width) for row in keep]  # of each: its text, its column
        columns = sorted({column for _, column in places}) if "logits_to_keep" in self._takes else range(group.width)
        arguments: dict[str, Any] = {
            self._cache_argument: SlotView(self.cache, group, starts, index, self._heads),
            "position_ids": positions.clamp(max=self.max_positions - 1).view(shape),
            "logits_to_keep": torch.tensor(columns, device=self.device),
        }
        taken = {k: value for k, value in arguments.items() if k == self._cache_argument or k in self._takes}
        tokens = torch.tensor(rows.tokens[span], device=self.device).view(shape)
        mask = self._mask(group, starts)
        with all_by_rows():
            output = self.model(input_ids=tokens, attention_mask=mask, use_cache=True, **taken)
        logits: torch.Tensor = output.logits.to(self.device)
        return logits[[text for text, _ in places], [columns.index(column) for _, column in places]]

    def _mask(self, group: Group, starts: int | torch.Tensor) -> torch.Tensor | None:
        """None where our mask function is called by the model; else a 4-D mask, or a 2-D one for alibi."""
        if self._alone:
            return torch.ones(1, group.key_length, dtype=torch.long, device=self.device)
        if self._builds_masks:
            return None
        return attention.additive_mask(
            len(group.starts), group.width, group.key_length, starts, dtype=self.dtype, device=self.device
        )

    @torch.inference_mode()
    def _dry_run(self, sample: list[int]) -> tuple[SlotCache, torch.Tensor]:
        """Discover the cache's shapes, and what the untouched model makes of the sample: logits [n, V]."""
        cache = DynamicCache()
        ids = torch.tensor([sample], device=self.device)
        logits = self.model(input_ids=ids, **{self._cache_argument: cache}).logits[0]
        layers = written_layers(cache)
        made = [layer for layer in layers if layer is not None]
        if not made:
            name = self.config.model_type
            raise UnsupportedModelError(f"{name!r} cannot serve: it wrote no keys and values; {ADVICE}")
        shapes = [LayerShape(0, 0, 0) if layer is None else _shape(*layer) for layer in layers]
        devices = [layer[0].device if layer is not None else self.device for layer in layers]
        return SlotCache(shapes, dtype=made[0][0].dtype, devices=devices), logits.to(self.device)

    def _optimise(self) -> None:
        """Our attention where the model's own code asks for one by name, packed weights on CPU."""
        if not self._alone:
            self._builds_masks = use_attention(self.model, attention.NAME, attention.attention, attention.additive_mask)
        pack_experts(self.model)
        pack_linears(self.model)
        pad_routers(self.model)

    def _check(self, sample: list[int], expected: torch.Tensor) -> None:
        """Compute the sample in two uneven steps beside another sequence; refuse a model that comes out different."""
        half = len(sample) // 2
        first = [Span(0, 0, sample[:half], half), Span(1, 0, sample[: half - 1], half - 1)]
        second = [Span(0, half, sample[half:], len(sample) - half), Span(1, half - 1, sample[half - 1 :], 1)]
        parts = [self.forward(plan(spans, 4, 128)) for spans in (first, second)]
        self.cache.release()
        found = torch.cat([parts[0][:half], parts[1][: len(sample) - half], parts[1][-1:]]).float()
        wanted = torch.cat([expected, expected[-1:]]).float()
        error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        most = 0.001 if self.dtype == torch.float32 else 0.1  # of bf16's rounding
        if not error.median() < most or not error[-1] < 5 * most:
            raise UnsupportedModelError(
                f"{self.config.model_type!r} cannot serve: through a cache written at positions its logits differ by "
                f"{error.max():.0%} from its own; {ADVICE}"
            )


def _kept_rows(group: Group, wanted: set[int], least: int) -> list[int]:
    """The group's rows that go through the head: the wanted ones, and others up to `least`."""
    rows = range(group.first_row, group.first_row + group.num_rows)
    keep = [row for row in rows if row in wanted]
    spare = (row for row in rows if row not in wanted)
    return sorted(keep + [row for row, _ in zip(spare, range(least - len(keep)), strict=False)])


def _shape(keys: torch.Tensor, values: torch.Tensor) -> LayerShape:
    return LayerShape(keys.shape[1], keys.shape[-1], values.shape[-1])


def _own_config(model: PreTrainedModel) -> None:
    """Give the model a copy of its configuration, so that what is set there concerns no other model."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module.__dict__.get("config"), PreTrainedConfig):
            module.config = deepcopy(module.__dict__["config"], copies)


def _embedding(model: PreTrainedModel) -> torch.Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _is_alibi(model: PreTrainedModel) -> bool:
    return model.config.model_type in ALIBI and not hasattr(model.config, "alibi")


def _positions(model: PreTrainedModel) -> tuple[int, int]:
    """How many positions the model has, and how many of them a text may take: padding needs some, if it is counted."""
    tables = [m.num_embeddings for n, m in model.named_modules() if isinstance(m, nn.Embedding) and n.endswith(".wpe")]
    limit = min([configured_length(model.config) or NO_LIMIT, *tables])
    counted = "position_ids" not in inspect.signature(model.forward).parameters and limit != NO_LIMIT
    return limit, limit - PADDING if counted else limit


def _sample(model: PreTrainedModel, max_positions: int) -> list[int]:
    vocabulary = _embedding(model).shape[0]
    return [(7 * i + 3) % vocabulary for i in range(min(12, max_positions))]
