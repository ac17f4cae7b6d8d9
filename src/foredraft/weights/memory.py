"""Memory for packed weights: few large blocks, in huge pages where the system gives them on demand.

Each pass reads all weights. In pages of 4 KiB it takes up to a tenth longer, for looking up where they are.
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

from foredraft.errors import ModelError

SMALLEST, LARGEST = 2**20, 2**25  # bytes of the first block, and of one that no tensor needs larger
HUGE = 2**22  # bytes from which on a block has huge pages, the last of which may be hardly used
ALIGNMENT = 64  # bytes, a line of the caches


class WeightMemory:
    """Hands out tensors that lie one after the other; a block goes with the last tensor in it."""

    def __init__(self) -> None:
        self.size = SMALLEST  # of the next block
        self.block: mmap.mmap | None = None
        self.used = 0  # bytes of it

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the CPU, zeros. Raises ModelError where there is no memory for it."""
        count = math.prod(shape)
        if not count:
            return torch.empty(*shape, dtype=dtype)
        start = -(-self.used // ALIGNMENT) * ALIGNMENT
        nbytes = count * dtype.itemsize
        if self.block is None or start + nbytes > len(self.block):
            self.block, start = _block(max(nbytes, self.size)), 0
            self.size = min(2 * self.size, LARGEST)
        self.used = start + nbytes
        return torch.frombuffer(self.block, dtype=dtype, count=count, offset=start).view(*shape)


def _block(nbytes: int) -> mmap.mmap:
    try:
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ModelError(f"no memory for {nbytes / 2**20:,.0f} MiB of weights: {error}") from error
    if nbytes >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
