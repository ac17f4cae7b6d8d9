"""Activation functions that give a row the same bits however many rows there are, and however many threads.

torch shares an elementwise operation among threads wherever its elements divide, and computes what is left over at the
end of a share one by one, by another exponential than the vectorised one: other last bits in fp32. So elements go in
portions that are one share each, and whole vectors. They are made contiguous, for torch computes GELU of strided rows
by another library.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from foredraft.upstream.modules import is_activation, is_patched, named_parts

# elements from which on torch shares GELU among threads; other functions from twice as many
SHARE = 16384
STEP = 128  # bytes that its vectorised loops take at once; what remains is computed one by one


def by_rows(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function`, elementwise, of x [..., D]: a tensor of x's shape."""
    if not x.is_cpu or not x.numel() or not x.dim():
        return function(x)
    width, step = x.shape[-1], STEP // x.element_size()
    if not width % step:
        return _in_portions(function, x.contiguous(), step)
    wide = F.pad(x, (0, -width % step))
    return _in_portions(function, wide, step)[..., :width].contiguous()


def _in_portions(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, step: int) -> torch.Tensor:
    if x.numel() < SHARE:
        return function(x)
    out = torch.empty_like(x)
    size = SHARE - step
    for part, result in zip(x.view(-1).split(size), out.view(-1).split(size), strict=True):
        result.copy_(function(part))
    return out


class ByRows(nn.Module):
    """An activation module, computed `by_rows`."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return by_rows(self.function, x)


def wrap_activations(model: PreTrainedModel) -> None:
    """Have a transformers model's activation modules computed `by_rows`, in place; not those that somebody hooks."""
    for module in list(model.modules()):
        for name, child in named_parts(module):
            if is_activation(child) and not is_patched(child) and not isinstance(module, ByRows):
                setattr(module, name, ByRows(child))
