"""Tokens drawn from rows of logits in the library: temperature, filters and noise in one call."""

import math
from array import array
from collections.abc import Sequence
from ctypes import addressof, byref
from functools import lru_cache
from typing import NamedTuple

import torch

from foredraft.native.library import Filters, loaded

MASK = 2**64 - 1


class Sampler(NamedTuple):
    """How a token is drawn; 0, 0, 1 and 0 take the likeliest of all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def filters(self) -> Filters:
        """For the library, which only reads it."""
        return _filters(self)


@lru_cache(maxsize=256)
def _filters(sampler: Sampler) -> Filters:
    temperature, top_k, top_p, min_p = sampler
    return Filters(top_p, temperature, math.log(min_p) if min_p > 0 else -math.inf, min(top_k, 2**31 - 1))


class Place(NamedTuple):
    """Which noise decides the rows of a call."""

    seeds: Sequence[int]
    positions: Sequence[int]
    stream: int


def serves(logits: torch.Tensor) -> bool:
    """Whether the library is there and takes these. # [n, V]"""
    return loaded() is not None and logits.is_cpu and logits.dtype == torch.float32 and logits.is_contiguous()


def choose(logits: torch.Tensor, sampler: Sampler, place: Place) -> tuple[list[int], list[float], list[float]]:
    """Each row's token, as `sampling.choose` has it, its largest score, how likely the token is. # [n, V] -> 3 x n"""
    library = loaded()
    assert library is not None, "ask `serves` first"
    rows, count = logits.shape
    seeds, positions = array("Q", [seed & MASK for seed in place.seeds]), array("i", place.positions)
    tokens, peaks = array("i", bytes(4 * rows)), array("f", bytes(8 * rows))  # and confidences
    if not library.functions.foredraft_choose(
        library.isa(), logits.data_ptr(), rows, count, byref(sampler.filters), _address(seeds), _address(positions),
        place.stream, _address(tokens), _address(peaks), _address(peaks) + 4 * rows,
    ):  # fmt: skip
        raise MemoryError(f"no memory to draw from {count} tokens")
    return tokens.tolist(), peaks[:rows].tolist(), peaks[rows:].tolist()


class Follower:
    """Draws one text's tokens along its drafts; what stays the same from pass to pass is made once."""

    __slots__ = ("filters", "found", "function", "isa", "keep", "peak", "room", "stream")

    def __init__(self, sampler: Sampler, stream: int) -> None:
        library = loaded()
        assert library is not None, "ask `serves` first"
        self.function, self.isa = library.functions.foredraft_follow, library.isa()
        self.keep = sampler.filters
        self.filters = addressof(self.keep)
        self.stream = stream
        self._make_room(8)

    def _make_room(self, rows: int) -> None:
        self.peak, self.found = array("f", [0.0]), array("i", bytes(4 * rows))
        self.room = rows, _address(self.found), _address(self.peak)

    def __call__(
        self, logits: torch.Tensor, seed: int, position: int, draft: Sequence[int], allowed: bytes | None = None
    ) -> list[int]:
        """Tokens along a draft [n], up to the first that it has not. # [n + 1, V] -> up to n + 1

        Or up to one from a row without a finite largest score: `peak` has that of the last row. The first token is that
        at `position`. `allowed` are sets of tokens, [n + 1, ceil(V / 8)].
        """
        rows, count = logits.shape
        if rows > self.room[0]:
            self._make_room(2 * rows)
        _, found, peak = self.room
        follow = array("i", draft) if draft else None
        done = self.function(
            self.isa, self.filters, seed & MASK, self.stream, logits.data_ptr(), rows, count, position,
            None if follow is None else _address(follow), allowed, found, peak,
        )  # fmt: skip
        if not done:
            raise MemoryError(f"no memory to draw from {count} tokens")
        return self.found[:done].tolist()


def _address(values: "array[int] | array[float]") -> int:
    return values.buffer_info()[0]
