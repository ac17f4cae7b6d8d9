"""SlotCache: keys and values of many sequences, a slot each, written at positions.

Rewinding is setting a length: nothing here is ever removed, later rows overwrite. Memory grows by doubling, in slots
and in length, so that a long context costs nothing until it is used. Knows nothing of models, tokens or requests.
"""

from dataclasses import dataclass

import torch

from foredraft.errors import CacheMemoryError
from foredraft.models.rows import round_up

GRANULE = 512  # slot lengths are multiples of this, hence of every key multiple


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Of one layer's cache: key-value heads, and the size of a key and of a value."""

    heads: int
    key_dim: int
    value_dim: int


class SlotCache:
    """Keys and values of `max_slots` sequences of up to `max_length` tokens.

    Per layer a tensor [slots, length, heads, dim] for keys and one for values, zeroed at allocation: a masked key then
    contributes exactly 0 to every sum.
    """

    def __init__(
        self,
        layers: list[LayerShape],
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_slots: int = 1,
        max_length: int = GRANULE,
    ) -> None:
        self.layers = layers
        self.dtype = dtype
        self.device = device
        self.max_slots = max_slots
        self.max_length = round_up(max_length, GRANULE)
        self.slots = 0
        self.length = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    @property
    def bytes_per_token(self) -> int:
        return sum(s.heads * (s.key_dim + s.value_dim) for s in self.layers) * self.dtype.itemsize

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `slots` slots of `length` positions.

        Raises:
            CacheMemoryError: the memory is not there; what was cached stays as it was.
        """
        if slots <= self.slots and length <= self.length:
            return
        new_slots = self.slots if slots <= self.slots else min(max(slots, 2 * self.slots), self.max_slots)
        new_length = self.length if length <= self.length else min(max(length, 2 * self.length), self.max_length)
        self._grow(max(new_slots, slots), round_up(max(new_length, length), GRANULE))

    def _grow(self, slots: int, length: int) -> None:
        try:
            keys = [self._grown(old, slots, length) for old in self._old(self.keys, "key_dim")]
            values = [self._grown(old, slots, length) for old in self._old(self.values, "value_dim")]
        except RuntimeError as error:  # torch raises its out-of-memory errors as RuntimeError on every device
            size = slots * length * self.bytes_per_token / 2**30
            raise CacheMemoryError(
                f"the cache needs {size:.2f} GiB on {self.device} for {slots} sequences of {length} tokens, which could "
                "not be allocated; lower max_model_len or max_batch_size"
            ) from error
        self.keys, self.values, self.slots, self.length = keys, values, slots, length

    def _old(self, tensors: list[torch.Tensor], dim: str) -> list[torch.Tensor]:
        if tensors:
            return tensors
        return [torch.zeros(0, 0, s.heads, getattr(s, dim), dtype=self.dtype, device=self.device) for s in self.layers]

    def _grown(self, old: torch.Tensor, slots: int, length: int) -> torch.Tensor:
        new = torch.zeros(slots, length, *old.shape[2:], dtype=self.dtype, device=self.device)
        new[: old.shape[0], : old.shape[1]] = old
        return new

    def clear(self, slot: int) -> None:
        """Zero a slot; needed only after it held values that are not finite."""
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()
