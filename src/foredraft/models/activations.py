"""Activation functions that give a row the same bits however many rows there are, and however many threads.

torch shares an elementwise operation among threads wherever the elements divide, amid a row too, and computes what is
left over at the end of a share one by one, by another exponential than the vectorised one: other last bits in fp32.
So rows go in such portions that each is one share, and each row starts a vector. (Always one after another: of those
that are not, torch computes GELU by another library.)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from foredraft.upstream.modules import is_activation

SHARE = (
    16384  # elements from which on torch shares GELU among threads (ATen's Activation.cpp); others from twice as many
)
STEP = 128  # bytes that its vectorised loops take at once; what remains is computed one by one


def by_rows(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function`, elementwise, of x [..., D]."""
    if not x.is_cpu:
        return function(x)
    width = x.shape[-1]
    rows = F.pad(x.reshape(-1, width), (0, -width % (STEP // x.element_size()))).contiguous()
    most = max(1, (SHARE - 1) // rows.shape[1])
    out = function(rows) if len(rows) <= most else torch.cat([function(part) for part in rows.split(most)])
    return out[:, :width].reshape(x.shape)


class ByRows(nn.Module):
    """An activation module, computed `by_rows`."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return by_rows(self.function, x)


def wrap_activations(model: PreTrainedModel) -> None:
    """Have a transformers model's activation modules computed `by_rows`, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if is_activation(child) and not isinstance(module, ByRows):
                setattr(module, name, ByRows(child))
