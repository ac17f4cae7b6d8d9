"""PageCache: keys and values in pages of 64 tokens, each of one text and all layers; memory goes when the text ends.

Rewinding is setting a length: later rows overwrite. A page is zeroed before it is used, so that a masked value
contributes exactly 0. Knows nothing of models, tokens or requests.
"""

from dataclasses import dataclass

import numpy as np
import torch

from foredraft.errors import CacheMemoryError
from foredraft.models.cache import GRANULE

PAGE = 64  # tokens, as in native.h
SPARE = 16  # pages that are kept for the next text


@dataclass(frozen=True, slots=True)
class PageShape:
    """Of the keys, and of the values, that one page holds."""

    layers: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return 2 * self.layers * self.kv_heads * PAGE * self.dim * self.dtype.itemsize


class PageCache:
    """Pages of `max_slots` texts of up to `max_length` tokens."""

    def __init__(self, shape: PageShape, *, max_slots: int = 1, max_length: int = GRANULE) -> None:
        self.shape = shape
        self.max_slots = max_slots
        self.max_length = max_length
        self.pages: list[list[torch.Tensor]] = []  # of each slot
        self.room: list[int] = []  # tokens that each slot's pages hold
        self.spare: list[torch.Tensor] = []
        self.table = np.zeros((0, 0), np.uint64)  # addresses of pages, [slots, pages]
        self.address = 0  # of the table

    @property
    def nbytes(self) -> int:
        return (sum(map(len, self.pages)) + len(self.spare)) * self.shape.nbytes

    @property
    def bytes_per_token(self) -> int:
        return self.shape.nbytes // PAGE

    @property
    def storage(self) -> list[torch.Tensor]:
        """All pages in use, slot after slot."""
        return [page for pages in self.pages for page in pages]

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `length` tokens in each of the first `slots` slots.

        Raises:
            CacheMemoryError: the memory is not there; what was cached stays as it was.
        """
        for slot in range(slots):
            self.extend(slot, length)

    def extend(self, slot: int, length: int) -> None:
        """Make room for `length` tokens in one slot. Raises as `reserve`."""
        if slot < len(self.room) and length <= self.room[slot]:
            return
        self._widen(slot + 1, -(-length // PAGE))
        pages = self.pages[slot]
        while len(pages) * PAGE < length:
            page = self.spare.pop().zero_() if self.spare else self._allocated()
            self.table[slot, len(pages)] = page.data_ptr()
            pages.append(page)
            self.room[slot] = len(pages) * PAGE

    def _widen(self, slots: int, pages: int) -> None:
        """Grow the table, by doubling."""
        rows, columns = self.table.shape
        if slots > rows or pages > columns:
            rows = max(rows, slots, min(2 * rows, self.max_slots) if slots > rows else 0)
            columns = max(columns, pages if pages <= columns else max(pages, 2 * columns))
            grown = np.zeros((rows, columns), np.uint64)
            grown[: self.table.shape[0], : self.table.shape[1]] = self.table
            self.table, self.address = grown, grown.ctypes.data
        while len(self.pages) < rows:
            self.pages.append([])
            self.room.append(0)

    def _allocated(self) -> torch.Tensor:
        try:
            return torch.zeros(self.shape.nbytes, dtype=torch.uint8)
        except RuntimeError as error:  # torch raises its out-of-memory errors as RuntimeError
            held = self.nbytes / 2**30
            raise CacheMemoryError(
                f"the cache holds {held:.2f} GiB, and a page of {self.shape.nbytes / 2**20:.2f} MiB more could not be "
                "allocated; lower max_model_len or max_batch_size"
            ) from error

    def free(self, slot: int) -> None:
        """Take a slot's pages back; a few are kept for whoever comes next."""
        if slot >= len(self.pages):
            return
        self.spare += self.pages[slot][: max(0, SPARE - len(self.spare))]
        self.pages[slot] = []
        self.room[slot] = 0
        self.table[slot] = 0

    def release(self) -> None:
        """Give all memory back; what was cached is gone."""
        self.pages, self.room, self.spare = [], [], []
        self.table, self.address = np.zeros((0, 0), np.uint64), 0

    @torch.inference_mode()
    def clear(self, slot: int, start: int = 0) -> None:
        """Zero a slot from a position on; needed only after it held values that are not finite."""
        for number, page in enumerate(self.pages[slot] if slot < len(self.pages) else ()):
            gone = torch.arange(number * PAGE, (number + 1) * PAGE) >= start
            for tokens in self.by_token(page):
                tokens.masked_fill_(gone.view(tokens.shape[2], 1, tokens.shape[4]), 0)

    def by_token(self, page: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [heads, dim / n, PAGE, n, 1] and values [heads, dim / 16, PAGE / n, 16, n] of a page, without a copy; n
        elements are a lane of 32 bits.
        """
        s = self.shape
        n = 4 // s.dtype.itemsize
        keys, values = page.view(s.dtype).view(s.layers * s.kv_heads, 2, PAGE * s.dim).unbind(1)
        return (
            keys.view(-1, s.dim // n, PAGE, n, 1),
            values.view(-1, s.dim // 16, PAGE // n, 16, n),
        )
