"""Elementwise functions that give a row the same bits however many rows there are, and however many threads.

torch shares an elementwise operation among threads wherever its elements divide, and computes what is left over at the
end of a share one by one, by another exponential than the vectorised one: other last bits in fp32. So elements go in
portions that are one share each, and whole vectors. They are made contiguous, for torch computes GELU of strided rows
by another library.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F

from foredraft.upstream.elementwise import rerouted

# elements from which on torch shares GELU among threads; other functions from twice as many
SHARE = 16384
STEP = 128  # bytes that its vectorised loops take at once; what remains is computed one by one


def all_by_rows() -> AbstractContextManager[None]:
    """Within it, on this thread, torch's functions that need it are computed `by_rows`, whoever calls them."""
    return rerouted(by_rows)


def by_rows(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function`, elementwise, of x: a tensor of x's shape."""
    if not x.is_cpu or not x.is_floating_point() or x.layout != torch.strided:
        return function(x)
    count, step = x.numel(), STEP // x.element_size()
    if count < SHARE and not count % step:  # nothing is left over or shared, as mostly in a step
        return function(x.contiguous())
    flat = x.reshape(-1)
    whole = F.pad(flat, (0, -count % step)) if count % step else flat.contiguous()
    return _in_portions(function, whole, step)[:count].view(x.shape)


def _in_portions(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, step: int) -> torch.Tensor:
    if x.numel() < SHARE:
        return function(x)
    out = torch.empty_like(x)
    size = SHARE - step
    for part, result in zip(x.split(size), out.split(size), strict=True):
        result.copy_(function(part))
    return out
