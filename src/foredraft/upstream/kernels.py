"""torch's operators for packed and quantised products, whose names are not public."""

import math
import warnings
from functools import cache
from typing import Any

import torch


def computes_bf16() -> bool:
    """Whether oneDNN computes in bf16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def can_prepack() -> bool:
    """Whether this build of torch packs weights for oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def prepack(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] in oneDNN's layout; `to_dense` gives it back exactly."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


ROWS_ON_TILES = 32


@cache
def _most_rows(dtype: torch.dtype) -> float:
    """How many rows a product takes whose bits are those of fewer.

    On Intel's tile registers (AMX) oneDNN sums the inputs of more than 32 rows in another order than those of fewer:
    with 2,048 inputs whose terms cancel 16 in 1,000 results differ. Elsewhere, and in fp32, there is no such limit.
    """
    tiles = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return ROWS_ON_TILES if tiles else math.inf


def _parts(x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """The rows of x [..., D] in parts that a product takes, as even as can be; None where it takes all."""
    rows = x.numel() // max(1, x.shape[-1])
    if rows <= _most_rows(x.dtype):
        return None
    return x.reshape(rows, x.shape[-1]).tensor_split(-(-rows // ROWS_ON_TILES))


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b"""
    parts = _parts(x)
    if parts is not None:
        return torch.cat([packed_linear(rows, packed, bias) for rows in parts]).view(*x.shape[:-1], -1)
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def packed_linear_added(
    residual: torch.Tensor, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """residual + x W^T + b, the sum fused into the product."""
    parts = _parts(x)
    if parts is not None:
        before = residual.reshape(-1, residual.shape[-1]).tensor_split(len(parts))
        both = zip(before, parts, strict=True)
        return torch.cat([packed_linear_added(old, rows, packed, bias) for old, rows in both]).view_as(residual)
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, "add")
    return out


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 15 [out, in] int32 in the layout of the device's kernel."""
    if codes.device.type == "cpu":
        packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed
    tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
    return packed


def int4_product(x: torch.Tensor, packed: torch.Tensor, group: int, grid: torch.Tensor) -> torch.Tensor:
    """x W^T with x [N, in] and the scales and offsets of `grid` [in / group, out, 2]."""
    product = torch._weight_int4pack_mm_for_cpu if x.is_cpu else torch._weight_int4pack_mm
    return product(x.contiguous(), packed, group, grid)


def int8_product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x W^T on a CPU: x [N, in] bf16, W = codes [out, in] int8 times scale [out] bf16."""
    return torch._weight_int8pack_mm(x.contiguous(), codes, scale)


def pack_int8_dynamic(codes: torch.Tensor, scale: torch.Tensor) -> Any:
    """Codes [out, in] int8 and scales [out] as `int8_rows_product` takes them."""
    zeros = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():  # deprecated, and without a successor that quantises the input as it goes
        warnings.simplefilter("ignore")
        tensor = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
    return torch.ops.quantized.linear_prepack(tensor, None)


def int8_rows_product(x: torch.Tensor, packed: Any) -> torch.Tensor:
    """x W^T in float32 with x [N, in] rounded to eight bits, each row by its own largest value."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):  # no operator there takes a scale of ours
        return torch.cat([torch.ops.quantized.linear_dynamic(row, packed) for row in x.split(1)])
    size = x.abs().amax(1, keepdim=True).clamp_(min=1e-30)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    out: torch.Tensor = multiply(x / size, 1 / 127, 128, packed)
    return out.mul_(size)


def unpack_int8_dynamic(packed: Any) -> torch.Tensor:
    """The weight [out, in] float32."""
    weight: torch.Tensor = torch.ops.quantized.linear_unpack(packed)[0]
    return weight.dequantize()
