"""Linear layers with weights packed for oneDNN, which are faster and agree for every row count from two up.

Where packing is missing (other processors, other devices, fp16) a plain linear serves; the row-invariance probe, not
this file, decides what is exact there.
"""

from typing import Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D


class LinearLayer(Protocol):
    """A linear layer of any weight format: y = x W^T + b, W [out, in]."""

    bias: torch.Tensor | None
    nbytes: int

    def forward(self, x: torch.Tensor) -> torch.Tensor: ...
    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + y"""
        ...

    def dense(self) -> torch.Tensor:
        """The weight it computes with."""
        ...


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN packs this weight: a CPU, and fp32, or bf16 where the processor computes in it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bf16 or weight.dtype == torch.float32


class PackedLinear(nn.Module):
    """y = x W^T + b for x [..., in] and W [out, in] packed once; it owns no unpacked copy."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.numel() * weight.element_size()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + y, the sum fused into the product."""
        op = torch.ops.mkldnn._linear_pointwise.binary
        out: torch.Tensor = op(x, residual, self.packed, self.bias, "add")
        return out

    def dense(self) -> torch.Tensor:
        weight: torch.Tensor = self.packed.to_dense()
        return weight


class PlainLinear(nn.Module):
    """The same contract on weights as they are."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.numel() * weight.element_size()
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return residual + F.linear(x, self.weight, self.bias)

    def dense(self) -> torch.Tensor:
        return self.weight


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear | PlainLinear:
    """The fastest linear layer for a weight [out, in] where it lies."""
    return PackedLinear(weight, bias) if can_pack(weight) else PlainLinear(weight, bias)


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Plain linear layers; of other subclasses (quantised ones, routers) only those that compute the same."""
    return type(module) is nn.Linear or type(module).__name__ == "FalconLinear"


def pack_linears(model: nn.Module) -> None:
    """Replace the linear layers of a transformers model in place, one at a time, so that memory peaks by one layer."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if _is_linear(child) and can_pack(child.weight):
                setattr(module, name, PackedLinear(child.weight, child.bias))
            elif type(child) is Conv1D and can_pack(child.weight):
                setattr(module, name, PackedLinear(child.weight.T, child.bias))
