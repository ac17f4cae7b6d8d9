"""Linear layers in four or eight bits, and how a layer of any format becomes one.

A model is quantised one layer at a time from what it computes with (packed weights give themselves back exactly),
whenever somebody asks. Knows nothing of models, caches or drafts.

Kernels: int4 and int8 weight-only are ATen's, in bf16 activations, and may verify. int8 dynamic also rounds its input:
faster on large layers, and good for drafts alone. In all of them a row's bits do not depend on the other rows.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F

from foredraft.upstream import kernels
from foredraft.upstream.modules import is_product, is_turned
from foredraft.weights.linear import LinearLayer, PackedLinear, PlainLinear, Readable
from foredraft.weights.rounding import check_group, pick_group, round_int4, round_int8

WeightFormat = Literal["int4", "int8", "int8-dynamic"]
OUT_MULTIPLE = 16  # rows of an int4 weight, padded with zeros
IN_MULTIPLE = 32  # inputs of an int8 weight, padded with zeros: ATen's kernel leaves out what is beyond a multiple
LARGE = 2**18  # weights beyond which int8 dynamic is faster than int8 weight-only: alike for one row, ahead for more


class QuantLinear(Readable):
    """y = x W^T + b with a quantised W [out, in]; takes and returns the dtype of x, whatever the kernel computes in."""

    bits: int
    nbytes: int

    def __init__(self, shape: Sequence[int], bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)  # calls cost more than small products
        out = self._product(rows)
        if out.dtype != x.dtype:
            out = out.to(x.dtype)
        if self.bias is not None:
            out = out + self.bias
        return out if rows is x else out.view(*x.shape[:-1], self.out_features)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + y, in the residual's dtype."""
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        out = self._product(rows)
        out = residual + (out if out.shape == residual.shape else out.view(residual.shape))
        out = out if self.bias is None else out + self.bias
        return out if out.dtype == residual.dtype else out.to(residual.dtype)

    @abc.abstractmethod
    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T, in any dtype. # [N, in] -> [N, out]"""


class Int4Linear(QuantLinear):
    """Four bits in groups along the input, each with a scale and an offset in bf16: w = (q - 8) * scale + offset."""

    bits = 4

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, group: int | None = None) -> None:
        super().__init__(weight.shape, bias)
        group = pick_group(weight) if group is None else check_group(group, weight)
        self._keep(*round_int4(F.pad(weight.detach(), (0, -weight.shape[1] % group)), group))

    @classmethod
    def from_codes(
        cls, codes: torch.Tensor, grid: torch.Tensor, in_features: int, bias: torch.Tensor | None = None
    ) -> "Int4Linear":
        """Of codes [out, width] uint8 and grid [out, width / group, 2], as `round_int4` returns them."""
        layer = cls.__new__(cls)
        QuantLinear.__init__(layer, (len(codes), in_features), bias)
        layer._keep(codes, grid)
        return layer

    def _keep(self, codes: torch.Tensor, grid: torch.Tensor) -> None:
        rows = -len(codes) % OUT_MULTIPLE
        self.padding = codes.shape[1] - self.in_features
        self.group = codes.shape[1] // grid.shape[1]
        self.grid = F.pad(grid, (0, 0, 0, 0, 0, rows)).transpose(0, 1).contiguous()  # as the kernels want it
        self.packed = kernels.pack_int4(F.pad(codes.int(), (0, 0, 0, rows)))
        self.nbytes = self.packed.numel() * self.packed.element_size() + self.grid.numel() * 2

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        x = x if x.dtype == torch.bfloat16 else x.to(torch.bfloat16)
        x = F.pad(x, (0, self.padding)) if self.padding else x
        out = kernels.int4_product(x, self.packed, self.group, self.grid)
        return out if out.shape[1] == self.out_features else out[:, : self.out_features]

    def dense(self) -> torch.Tensor:
        """Read off the kernel itself, as products with unit vectors; on a GPU these are rounded to bf16."""
        grid = self.grid.float() if self.grid.device.type == "cpu" else self.grid
        unit = torch.eye(self.in_features + self.padding, dtype=grid.dtype, device=grid.device)
        rows = torch.cat([kernels.int4_product(part, self.packed, self.group, grid) for part in unit.split(256)])
        return rows.float().T[: self.out_features, : self.in_features].contiguous()


class Int8Linear(QuantLinear):
    """Eight bits, symmetric, with a bf16 scale for each output."""

    bits = 8

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__(weight.shape, bias)
        self._hold(*round_int8(weight.detach(), torch.bfloat16))

    @classmethod
    def from_codes(cls, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> Self:
        """Of a stored weight: codes [out, in] and scale [out] as `round_int8` makes them."""
        layer = cls.__new__(cls)
        QuantLinear.__init__(layer, codes.shape, bias)
        layer._hold(codes, scale)
        return layer

    def _hold(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.padding = -codes.shape[1] % IN_MULTIPLE
        self.codes = F.pad(codes, (0, self.padding))
        self.scale = scale.to(torch.bfloat16)
        self.nbytes = self.codes.numel() + 2 * self.scale.numel()

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        x = x if x.dtype == torch.bfloat16 else x.to(torch.bfloat16)
        x = F.pad(x, (0, self.padding)) if self.padding else x
        if x.is_cpu:
            return kernels.int8_product(x, self.codes, self.scale)
        return F.linear(x, self.codes.to(x.dtype)) * self.scale

    def dense(self) -> torch.Tensor:
        return self.codes[:, : self.in_features].float() * self.scale.float()[:, None]


class DynamicInt8Linear(QuantLinear):
    """Eight bits for weight and input: the fastest on a CPU, for drafts only.

    Each row of the input is rounded by its own largest value, so that its bits do not depend on the other rows.
    """

    bits = 8

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__(weight.shape, bias)
        codes, scale = round_int8(weight.detach(), torch.float32)
        self.packed = kernels.pack_int8_dynamic(codes, scale)
        self.nbytes = codes.numel() + 4 * scale.numel()

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.int8_rows_product(x.float(), self.packed)

    def dense(self) -> torch.Tensor:
        return kernels.unpack_int8_dynamic(self.packed)


@dataclass(frozen=True, slots=True)
class ForDrafting:
    """Rounds a draft model: on the native runtime to `weight_format`.

    On torch a packed layer gets the eight bits that are fastest for its size, for fewer are slower there; other layers
    stay as they are.
    """

    weight_format: WeightFormat

    def __call__(self, layer: Any) -> Any:
        if not isinstance(layer, PackedLinear) or layer.read is not None:
            return layer
        return quant_linear(layer.dense(), layer.bias, "int8-dynamic")


FORMATS: dict[WeightFormat, Callable[[torch.Tensor, torch.Tensor | None], QuantLinear]] = {
    "int4": Int4Linear,
    "int8": Int8Linear,
    "int8-dynamic": DynamicInt8Linear,
}


def quant_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, weight_format: WeightFormat, group: int | None = None
) -> QuantLinear:
    """A quantised layer of a weight [out, in]; `group` is for int4, None leaves the choice to `pick_group`.

    Raises:
        ModelError: a group size that the kernels lack or that does not divide the layer's input.
    """
    if weight_format == "int4":
        return Int4Linear(weight, bias, group)
    if weight_format == "int8-dynamic" and (weight.device.type != "cpu" or weight.numel() <= LARGE):
        weight_format = "int8"
    return FORMATS[weight_format](weight, bias)


@dataclass(slots=True)
class Quantizer:
    """Turns layers of any format into quantised ones, each once; layers that are as narrow already stay as they are.

    `nbytes` counts what it has made, that is, what a copy adds to the model it was made from.
    """

    weight_format: WeightFormat
    group: int | None = None
    nbytes: int = 0
    made: dict[int, Any] = field(default_factory=dict)

    def __call__(self, layer: Any) -> Any:
        if id(layer) not in self.made:
            self.made[id(layer)] = self._quantised(layer)
        return self.made[id(layer)]

    def _quantised(self, layer: Any) -> LinearLayer:
        if isinstance(layer, QuantLinear) and layer.bits <= (4 if self.weight_format == "int4" else 8):
            return layer
        if isinstance(layer, PackedLinear) and layer.read is not None:  # its owner's code computes with the weight too
            return layer
        found = quant_linear(dense(layer), layer.bias, self.weight_format, self.group)
        self.nbytes += found.nbytes
        return found


def is_linear(module: object) -> bool:
    """Whether `dense` can read it: ours, or transformers' own."""
    return isinstance(module, QuantLinear | PackedLinear | PlainLinear) or is_product(module)


def dense(layer: Any) -> torch.Tensor:
    """The weight [out, in] that a layer of any format computes with."""
    if is_product(layer):
        return layer.weight.detach().T if is_turned(layer) else layer.weight.detach()
    weight = layer.dense()
    assert isinstance(weight, torch.Tensor)
    return weight
