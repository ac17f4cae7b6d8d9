"""Scores under a set of tokens: those that may not come get -inf. In C where the native library is there."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch

from foredraft.native.library import LibraryError, load
from foredraft.structured.constraint import Bits

BYTES = np.arange(256, dtype=np.uint8)[:, None]
LIMITS = np.where(np.unpackbits(BYTES, axis=1, bitorder="little"), np.float32(np.inf), np.float32(-np.inf))  # [256, 8]


def only(scores: torch.Tensor, allowed: Sequence[Bits]) -> torch.Tensor:
    """A copy of the scores with -inf where a token is not in its row's set; NaN stays. # [n, V], n -> [n, V]"""
    rows, count = scores.shape
    sets = b"".join(allowed)
    assert len(sets) == rows * -(-count // 8), f"{len(sets)} bytes of sets for scores {tuple(scores.shape)}"
    function, isa = _native()
    if function is None or not (scores.is_cpu and scores.is_contiguous()):
        return by_table(scores, sets)
    masked = torch.empty_like(scores)
    function(isa, scores.data_ptr(), sets, rows, count, masked.data_ptr())
    return masked


@cache
def _native() -> tuple[Callable[..., None] | None, int]:
    """The library's function and the number of its instruction set; None where there is no library."""
    try:
        library = load()
    except LibraryError:
        return None, 0
    return library.functions.foredraft_mask, library.isa()


def by_table(scores: torch.Tensor, sets: bytes) -> torch.Tensor:
    """The same by numpy on a CPU: torch's threads and others' would take turns at the cores, for milliseconds."""
    limits = LIMITS.take(np.frombuffer(sets, np.uint8), axis=0).reshape(len(scores), -1)[:, : scores.shape[1]]
    if scores.is_cpu:
        return torch.from_numpy(np.minimum(scores.detach().numpy(), limits))
    return scores.minimum(torch.from_numpy(limits).to(scores.device))
