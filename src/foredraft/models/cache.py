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

    @property
    def width(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)


class SlotCache:
    """Keys and values of `max_slots` sequences of up to `max_length` tokens.

    Per layer one tensor [slots, length, heads * (key_dim + value_dim)], a token's keys before its values, zeroed at
    allocation: a masked key then contributes exactly 0 to every sum.
    """

    def __init__(
        self,
        layers: list[LayerShape],
        *,
        dtype: torch.dtype,
        devices: list[torch.device],
        max_slots: int = 1,
        max_length: int = GRANULE,
    ) -> None:
        self.layers = layers
        self.dtype = dtype
        self.devices = devices  # one for each layer
        self.max_slots = max_slots
        self.max_length = round_up(max_length, GRANULE)
        self.slots = 0
        self.length = 0
        self.storage: list[torch.Tensor] = []
        self._views: dict[tuple[int, int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @property
    def nbytes(self) -> int:
        return self.slots * self.length * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        return sum(shape.width for shape in self.layers) * self.dtype.itemsize

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `slots` slots of `length` positions; grows by doubling up to the maxima.

        Raises:
            CacheMemoryError: the memory is not there; what was cached stays as it was.
        """
        if slots <= self.slots and length <= self.length:
            return
        slots = max(self.slots, slots, min(2 * self.slots, self.max_slots) if slots > self.slots else 0)
        length = max(self.length, length, min(2 * self.length, self.max_length) if length > self.length else 0)
        self._grow(slots, round_up(length, GRANULE))

    def _grow(self, slots: int, length: int) -> None:
        try:
            storage = [self._grown(layer, slots, length) for layer in range(len(self.layers))]
        except RuntimeError as error:  # torch raises its out-of-memory errors as RuntimeError on every device
            size = slots * length * self.bytes_per_token / 2**30
            raise CacheMemoryError(
                f"the cache needs {size:.2f} GiB on {self.devices[0]} for {slots} sequences of {length} tokens, which "
                "could not be allocated; lower max_model_len or max_batch_size"
            ) from error
        self.storage, self.slots, self.length = storage, slots, length
        self._views.clear()

    def _grown(self, layer: int, slots: int, length: int) -> torch.Tensor:
        new = torch.zeros(slots, length, self.layers[layer].width, dtype=self.dtype, device=self.devices[layer])
        if self.storage:
            new[: self.slots, : self.length] = self.storage[layer]
        return new

    def release(self) -> None:
        """Give all memory back; what was cached is gone."""
        self.storage, self.slots, self.length = [], 0, 0
        self._views.clear()

    def write(self, layer: int, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Store rows [N, heads * (key_dim + value_dim)] at index [N] = slot * length + position."""
        self.storage[layer].view(-1, self.layers[layer].width).index_copy_(0, index, rows)

    def views(self, first_slot: int, count: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer keys [count, heads, length, key_dim] and values of consecutive slots, without a copy."""
        key = (first_slot, count, length)
        if key not in self._views:
            if len(self._views) >= 64:
                self._views.clear()
            self._views[key] = [self._view(layer, *key) for layer in range(len(self.layers))]
        return self._views[key]

    def _view(self, layer: int, first_slot: int, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.layers[layer]
        rows = self.storage[layer][first_slot : first_slot + count, :length]
        keys, values = rows.split((shape.heads * shape.key_dim, shape.heads * shape.value_dim), dim=-1)
        return (
            keys.unflatten(-1, (shape.heads, shape.key_dim)).transpose(1, 2),
            values.unflatten(-1, (shape.heads, shape.value_dim)).transpose(1, 2),
        )

    @torch.inference_mode()
    def clear(self, slot: int, start: int = 0) -> None:
        """Zero a slot, if it has memory, from a position on; needed only after it held values that are not finite."""
        if slot < self.slots:
            for tensor in self.storage:
                tensor[slot, start:].zero_()
