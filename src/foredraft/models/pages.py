"""PageCache: keys and values in pages of 64 tokens, each of one text or of several that begin alike, and all layers.

A page goes when the last text that holds it ends, or is kept a while for texts that begin with the same tokens. Whole
pages alone are shared, and a shared one is never written: who must write there gets a copy. Rewinding is setting a
length: later rows overwrite. A page is zeroed before it is used, so that a masked value contributes exactly 0. Knows
nothing of models or requests.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from foredraft.errors import CacheMemoryError
from foredraft.models.cache import GRANULE
from foredraft.models.prefixes import Page, Prefixes

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

    page = PAGE
    key_multiple = 1  # a pass attends to the keys that there are

    def __init__(self, shape: PageShape, *, max_slots: int = 1, max_length: int = GRANULE) -> None:
        self.shape = shape
        self.max_slots = max_slots
        self.max_length = max_length
        self.sharing = False  # may texts that begin alike hold the same pages?
        self.most_kept = 0  # pages of ended texts
        self._start()

    def _start(self) -> None:
        self.pages: list[list[Page]] = []  # of each slot
        self.room: list[int] = []  # tokens that each slot's pages hold
        self.shared: list[int] = []  # of these, the tokens of pages that others may hold too: the first ones
        self.used = 0  # pages that texts hold
        self.spare: list[torch.Tensor] = []
        self.prefixes = Prefixes(PAGE)
        self.table = np.zeros((0, 0), np.uint64)  # addresses of pages, [slots, pages]
        self.address = 0  # of the table

    @property
    def nbytes(self) -> int:
        return (self.used + len(self.spare)) * self.shape.nbytes

    @property
    def kept_bytes(self) -> int:
        return len(self.prefixes.idle) * self.shape.nbytes

    @property
    def bytes_per_token(self) -> int:
        return self.shape.nbytes // PAGE

    @property
    def storage(self) -> list[torch.Tensor]:
        """All pages in use, slot after slot."""
        return [page.memory for pages in self.pages for page in pages]

    def need(self, lengths: Sequence[int], slots: int = 0) -> int:
        """Bytes that texts of these lengths take together, in whatever slots."""
        return sum(-(-length // PAGE) for length in lengths) * self.shape.nbytes

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `length` tokens in each of the first `slots` slots.

        Raises:
            CacheMemoryError: the memory is not there; what was cached stays as it was.
        """
        for slot in range(slots):
            self._grow(slot, length)

    def extend(self, slot: int, start: int, length: int) -> None:
        """Make room for `length` tokens in one slot, to write those from `start` on. Raises as `reserve`."""
        if slot < len(self.room) and length <= self.room[slot] and start >= self.shared[slot]:
            return
        self._grow(slot, length)
        while self.shared[slot] > start:
            self._own(slot)

    def _grow(self, slot: int, length: int) -> None:
        self._widen(slot + 1, -(-length // PAGE))
        while self.room[slot] < length:
            self._append(slot, Page(self._memory()))
            self.used += 1

    def _append(self, slot: int, page: Page) -> None:
        self.table[slot, len(self.pages[slot])] = page.memory.data_ptr()
        self.pages[slot].append(page)
        self.room[slot] += PAGE

    def _own(self, slot: int) -> None:
        """Take a copy of the last page that the slot shares, in its place."""
        number = self.shared[slot] // PAGE - 1
        copy = Page(self._memory())
        copy.memory.copy_(self.pages[slot][number].memory)
        self.used += 1
        self._replace(slot, number, copy)
        self.shared[slot] -= PAGE

    def _replace(self, slot: int, number: int, page: Page) -> None:
        self._drop(self.pages[slot][number])
        self.pages[slot][number] = page
        self.table[slot, number] = page.memory.data_ptr()

    def _drop(self, page: Page) -> None:
        """One text less holds a page; of those that are free then a few are kept for whoever comes next."""
        free = self.prefixes.drop(page)
        self.used -= not page.users
        if free:
            self._save(page)
        elif not page.users:
            self._trim()

    def _save(self, page: Page) -> None:
        if len(self.spare) < SPARE:
            self.spare.append(page.memory)

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
            self.shared.append(0)

    def _memory(self) -> torch.Tensor:
        """Of a page, zeroed. What ended texts left goes where there is no other."""
        if self.spare:
            return _zeroed(self.spare.pop())
        try:
            return self._allocated()
        except CacheMemoryError:
            gone = self.prefixes.trim(0)
            if not gone:
                raise
            return _zeroed(gone[0].memory)

    def _allocated(self) -> torch.Tensor:
        try:
            return _zeroed(torch.empty(self.shape.nbytes, dtype=torch.uint8))
        except RuntimeError as error:  # torch raises its out-of-memory errors as RuntimeError
            held = self.nbytes / 2**30
            raise CacheMemoryError(
                f"the cache holds {held:.2f} GiB, and a page of {self.shape.nbytes / 2**20:.2f} MiB more could not be "
                "allocated; lower max_model_len or max_batch_size"
            ) from error

    def shrink(self) -> None:
        """Pages of ended texts are kept apart."""

    def keep(self, nbytes: int) -> None:
        """Keep so many bytes of pages of ended texts at most, from here on."""
        self.most_kept = nbytes // self.shape.nbytes
        self._trim()

    def _trim(self) -> None:
        for page in self.prefixes.trim(self.most_kept):
            self._save(page)

    def adopt(self, slot: int, tokens: Sequence[int], name: str | None) -> int:
        """Hold, beside the pages that a slot shares already, those that others computed of the tokens of its text.

        Returns how many tokens the slot shares. Texts share under one name; under None they do not.
        """
        self._widen(slot + 1, -(-len(tokens) // PAGE))
        held = self.shared[slot]
        if name is None or not self.sharing or self.room[slot] > held:  # it has begun a page of its own
            return held
        for page in self.prefixes.take(self._before(slot, name), tokens[held:]):
            self.used += page.users == 1
            self._append(slot, page)
        self.shared[slot] = self.room[slot]
        return self.shared[slot]

    def publish(self, slot: int, tokens: Sequence[int], length: int, name: str | None) -> None:
        """A slot holds the first `length` of these tokens, all computed: others of that name may share whole pages."""
        if name is None or not self.sharing or slot >= len(self.shared):
            return
        while self.shared[slot] + PAGE <= length:
            start = self.shared[slot]
            page = self.pages[slot][start // PAGE]
            found = self.prefixes.share(page, self._before(slot, name), tokens[start : start + PAGE])
            if found is not page:  # somebody computed the same at the same time
                self.used += found.users == 1
                self._replace(slot, start // PAGE, found)
            self.shared[slot] += PAGE

    def _before(self, slot: int, name: str) -> int | str:
        held = self.shared[slot] // PAGE
        return self.pages[slot][held - 1].number if held else name

    def free(self, slot: int) -> None:
        """A slot's text has ended: give its pages back, the last one first."""
        if slot >= len(self.pages):
            return
        for page in reversed(self.pages[slot]):
            self._drop(page)
        self.pages[slot] = []
        self.room[slot] = self.shared[slot] = 0
        self.table[slot] = 0

    def release(self) -> None:
        """Give all memory back; what was cached is gone."""
        self._start()

    @torch.inference_mode()
    def clear(self, slot: int, start: int = 0) -> None:
        """Zero a slot from a position on; needed only after it held values that are not finite."""
        if slot >= len(self.pages):
            return
        self.extend(slot, start, self.room[slot])
        for number, page in enumerate(self.pages[slot][start // PAGE :], start // PAGE):
            gone = torch.arange(number * PAGE, (number + 1) * PAGE) >= start
            for tokens in self.by_token(page):
                tokens.masked_fill_(gone.view(tokens.shape[2], 1, tokens.shape[4]), 0)

    def by_token(self, page: Page) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [heads, dim / n, PAGE, n, 1] and values [heads, dim / 16, PAGE / n, 16, n] of a page, without a copy; n
        elements are a lane of 32 bits.
        """
        s = self.shape
        n = 4 // s.dtype.itemsize
        keys, values = page.memory.view(s.dtype).view(s.layers * s.kv_heads, 2, PAGE * s.dim).unbind(1)
        return (
            keys.view(-1, s.dim // n, PAGE, n, 1),
            values.view(-1, s.dim // 16, PAGE // n, 16, n),
        )


def _zeroed(memory: torch.Tensor) -> torch.Tensor:
    """By this thread alone: torch's threads take milliseconds to wake where the library's keep their cores busy, and
    a forked process has none of them."""
    ctypes.memset(memory.data_ptr(), 0, memory.nbytes)
    return memory
