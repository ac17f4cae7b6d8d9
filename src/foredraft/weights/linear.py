"""Linear layers with weights packed for oneDNN, which are faster and agree for every row count from two up.

Where packing is missing (other processors, other devices, fp16) a plain linear serves; the row-invariance probe, not
this file, decides what is exact there.
"""

import abc
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from foredraft.upstream import kernels
from foredraft.upstream.modules import is_product, is_turned


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
    if weight.device.type != "cpu" or not kernels.can_prepack():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and kernels.computes_bf16())


class Readable(nn.Module, abc.ABC):
    """A layer that gives its weight to code that reads it (adapters, some routers), and keeps it from then on."""

    read: torch.Tensor | None = None

    @abc.abstractmethod
    def dense(self) -> torch.Tensor:
        """The weight it computes with."""

    @property
    def weight(self) -> torch.Tensor:
        if self.read is None:
            self.read = self.dense()
        return self.read


class PackedLinear(Readable):
    """y = x W^T + b for x [..., in] and W [out, in] packed once; it owns no unpacked copy unless somebody reads it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.numel() * weight.element_size()
        self.packed = kernels.prepack(weight)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.packed_linear(x, self.packed, self.bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + y, the sum fused into the product."""
        return kernels.packed_linear_added(residual, x, self.packed, self.bias)

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


def pack_linears(model: nn.Module) -> None:
    """Replace the linear layers of a transformers model in place, one at a time, so that memory peaks by one layer."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if is_product(child) and can_pack(child.weight):
                setattr(module, name, PackedLinear(child.weight.T if is_turned(child) else child.weight, child.bias))
