"""CausalModel: what the engine and the drafters need of a model, and nothing more."""

from typing import Protocol

import torch
from transformers import GenerationConfig, PreTrainedConfig

from foredraft.models.cache import SlotCache
from foredraft.models.rows import RowBatch, RowInvariance


class CausalModel(Protocol):
    """A causal language model with a cache that is written at positions."""

    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    cache: SlotCache
    row_invariance: RowInvariance
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    max_positions: int

    @property
    def weight_bytes(self) -> int: ...

    def forward(self, rows: RowBatch) -> torch.Tensor:
        """Write the rows' keys and values into the cache; return logits [R, V] of the wanted rows."""
        ...
