"""transformers' caches: how a forward takes one, what it wrote there, and a cache of ours in its place."""

import abc
import inspect
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

CACHE_ARGUMENTS = ("cache", "past_key_values")  # transformers renamed it in 5.24
REWINDABLE = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}  # by name: the last is younger than the others


def cache_argument(model: nn.Module) -> str | None:
    """The name under which the model's forward takes a cache; None where it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), None)


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether the model keeps a state besides keys and values."""
    return bool(getattr(model, "_is_stateful", False))


def unrewindable_layers(config: PreTrainedConfig) -> list[str]:
    """The kinds of layers whose state is not keys and values at positions."""
    return sorted({type(layer).__name__ for layer in DynamicCache(config=config).layers} - REWINDABLE)


def written_layers(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Keys and values [B, H, W, D] that a pass wrote, by layer; None where it wrote nothing."""
    layers: list[Any] = cache.layers
    return [(each.keys, each.values) if getattr(each, "is_initialized", False) else None for each in layers]


class CacheView(Cache, abc.ABC):
    """A cache of ours as transformers' modules and mask functions see it, in one pass over rows of one width.

    `start` is where the first sequence's rows begin; `offsets` where each one's do, as a number or [B]; `key_length`
    how many keys attention sees.
    """

    def __init__(self, start: int, offsets: int | torch.Tensor, key_length: int) -> None:
        super().__init__(layers=[])
        self._start = start
        self._offsets = offsets
        self._key_length = key_length

    @abc.abstractmethod
    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [B, H, W, D]; return all that attention sees, [B, H, key_length, D]."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.store(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._start

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self._offsets

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._key_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self._key_length
