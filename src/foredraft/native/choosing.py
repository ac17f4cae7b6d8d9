"""Tokens drawn from rows of logits in the library: temperature, filters and noise in one call."""

import math
from array import array
from collections.abc import Sequence
from ctypes import byref
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


def choose(
    logits: torch.Tensor, sampler: Sampler, place: Place, draft: Sequence[int] | None = None
) -> tuple[list[int], list[float], list[float]]:
    """Each row's token, as `sampling.choose` has it, its largest score, and how likely the token is. # [n, V] -> 3 x n

    With a draft of n - 1 tokens, up to the first row whose token is another.
    """
    library = loaded()
    assert library is not None, "ask `serves` first"
    rows, count = logits.shape
    seeds, positions = array("Q", [seed & MASK for seed in place.seeds]), array("i", place.positions)
    tokens, peaks = array("i", bytes(4 * rows)), array("f", bytes(8 * rows))  # and confidences
    follow = array("i", draft or ())
    done = library.functions.foredraft_choose(
        library.isa(), logits.data_ptr(), rows, count, byref(sampler.filters), _address(seeds), _address(positions),
        place.stream, _address(follow) if draft else None, _address(tokens), _address(peaks),
        _address(peaks) + 4 * rows,
    )  # fmt: skip
    if done < 0:
        raise MemoryError(f"no memory to draw from {count} tokens")
    return tokens[:done].tolist(), peaks[:done].tolist(), peaks[rows : rows + done].tolist()


def _address(values: "array[int] | array[float]") -> int:
    return values.buffer_info()[0]
