"""SlotCache: keys and values of many sequences, a slot each, written at positions.

Rewinding is setting a length: nothing here is ever removed, later rows overwrite. Memory doubles and halves with what
runs, in slots and in length, so that a long context costs nothing until it is used, and nothing any more afterwards.
Knows nothing of models, tokens or requests.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from foredraft.errors import CacheMemoryError
from foredraft.models.rows import SHORT_SPAN, round_keys, round_up

GRANULE = 512  # a cache's most positions are a multiple of this, hence of every key multiple
LEAST = 128  # positions of the smallest block


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
    allocation: a masked key then contributes exactly 0 to every sum. It is as long as the longest text that runs, and
    shrinks once that has ended and others come.
    """

    page, sharing, kept_bytes = 0, False, 0  # a row's bits depend on how its keys were computed: texts share nothing

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
        on_cpu = all(device.type == "cpu" for device in devices)
        self.least, self.slack = (LEAST, 1) if on_cpu else (GRANULE, 4)  # captured graphs end with their block
        self.key_multiple = LEAST  # of the keys that a pass attends to
        self.generation = 0  # of the storage
        self.slots = self.length = 0
        self.used: dict[int, int] = {}  # by slot of a running text: positions that it needs
        self.storage: list[torch.Tensor] = []
        self._views: dict[tuple[int, int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @property
    def nbytes(self) -> int:
        return self.slots * self.length * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        return sum(shape.width for shape in self.layers) * self.dtype.itemsize

    def need(self, lengths: Sequence[int], slots: int = 0) -> int:
        """Bytes that texts of these lengths take together at most, in so many slots or one for each.

        With the rows and keys that a pass adds for the sake of its shape.
        """
        longest = round_keys(max(lengths, default=0) + SHORT_SPAN, self.key_multiple)
        slots, length = self._size(max(slots, len(lengths)), longest)
        return slots * length * self.bytes_per_token

    def _size(self, slots: int, length: int) -> tuple[int, int]:
        """Slots and tokens of the block that holds them, each the next power of two up to its maximum."""
        return _doubled(slots, 1, self.max_slots), _doubled(length, self.least, self.max_length)

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `length` positions in each of the first `slots` slots.

        Raises:
            CacheMemoryError: the memory is not there; what was cached stays as it was.
        """
        self.extend(0, slots, length)

    def extend(self, first_slot: int, count: int, length: int) -> None:
        """Make room for `length` positions in consecutive slots. Raises as `reserve`.

        What texts that have ended leave too large is made smaller here.
        """
        missing = [slot for slot in range(first_slot, first_slot + count) if length > self.used.get(slot, 0)]
        if not missing:
            return
        used = self.used | dict.fromkeys(missing, length)
        slots, length = self._size(max(used) + 1, max(used.values()))
        large = self.slots * self.length > self.slack * slots * length
        if large or slots > self.slots or length > self.length:
            self._resize(slots, length)
        self.used = used

    def _resize(self, slots: int, length: int) -> None:
        try:
            storage = [self._resized(layer, slots, length) for layer in range(len(self.layers))]
        except RuntimeError as error:  # torch raises its out-of-memory errors as RuntimeError on every device
            size = slots * length * self.bytes_per_token / 2**30
            raise CacheMemoryError(
                f"the cache needs {size:.2f} GiB on {self.devices[0]} for {slots} sequences of {length} tokens, which "
                "could not be allocated; lower max_model_len or max_batch_size"
            ) from error
        self.storage, self.slots, self.length = storage, slots, length
        self.generation += 1
        self._views.clear()

    def _resized(self, layer: int, slots: int, length: int) -> torch.Tensor:
        new = torch.zeros(slots, length, self.layers[layer].width, dtype=self.dtype, device=self.devices[layer])
        if self.storage:
            both, shorter = min(slots, self.slots), min(length, self.length)
            new[:both, :shorter] = self.storage[layer][:both, :shorter]
        return new

    def free(self, slot: int) -> None:
        """A text has ended; its memory goes when others come that need less."""
        self.used.pop(slot, None)

    def shrink(self) -> None:
        """Now, rather than when another text comes."""
        if self.used:
            self._resize(*self._size(max(self.used) + 1, max(self.used.values())))
        else:
            self.release()

    def keep(self, nbytes: int) -> None:
        """Nothing is kept of ended texts."""

    def adopt(self, slot: int, tokens: Sequence[int], name: str | None) -> int:
        """Nothing is shared; but room for the text's first tokens is made at once."""
        with suppress(CacheMemoryError):  # the pass will say so
            self.extend(slot, 1, len(tokens))
        return 0

    def publish(self, slot: int, tokens: Sequence[int], length: int, name: str | None) -> None:
        """Nothing is shared."""

    def release(self) -> None:
        """Give all memory back; what was cached is gone."""
        self.storage, self.used, self.slots, self.length = [], {}, 0, 0
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


def _doubled(value: int, least: int, most: int) -> int:
    """The first of least, 2 least, 4 least, ... that is not below a value; or `most`, if that does, or the value."""
    size = least
    while size < value:
        size *= 2
    return max(value, min(size, most))
