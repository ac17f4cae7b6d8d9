"""StoredLinear: a linear layer as a low-bit checkpoint holds it, in no kernel's layout.

Owns the stored number formats (docs/low-bit.md) and the way from them to a layer that computes. Knows nothing of files.
"""

from collections.abc import Sequence

import torch
from torch import nn

from foredraft.weights.quantize import Int4Linear, Int8Linear, QuantLinear
from foredraft.weights.rounding import CHUNK, pick_group, round_int4, round_int8

TENSORS = {4: ("codes", "grid"), 8: ("codes", "scale")}  # of a layer with so many bits, beside its bias


class StoredLinear(nn.Module):
    """Codes and scales of a weight [out, in]; it cannot compute, `fuse` makes of it what does.

    4 bits: codes [out, width / 2] uint8, two to a byte, the even input in the high half; grid [out, groups, 2] bf16,
    scale and offset; w = (code - 8) * scale + offset. `width` is `in`, padded to whole groups.
    8 bits: codes [out, in] int8; scale [out] bf16; w = code * scale.
    """

    codes: torch.Tensor
    grid: torch.Tensor  # of 4 bits
    scale: torch.Tensor  # of 8 bits

    def __init__(self, tensors: dict[str, torch.Tensor], in_features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.bits = 4 if "grid" in tensors else 8
        self.in_features = in_features
        self.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def out_features(self) -> int:
        return len(self.codes)

    @property
    def groups(self) -> int:
        return int(self.grid.shape[1]) if self.bits == 4 else 1

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the tensors are those of a weight of this shape [out, in]."""
        rows, width = self.codes.shape
        if self.bits == 8:
            return (rows, width) == tuple(shape) and self.scale.shape == (rows,)
        whole = (2 * width) % self.groups == 0 and 0 <= 2 * width - shape[1] < 2 * width // self.groups
        return rows == shape[0] and whole and self.grid.shape == (rows, self.groups, 2)

    def empty(self) -> None:
        """Let go of the tensors, once they serve in a kernel's layout."""
        for name in TENSORS[self.bits]:
            setattr(self, name, getattr(self, name).new_empty(0))


def quantize_weight(weight: torch.Tensor, bits: int, group: int | None = None) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight [out, in]; `group` is for 4 bits, None leaves the choice to `pick_group`."""
    if bits == 8:
        codes, scale = round_int8(weight, torch.bfloat16)
        return {"codes": codes, "scale": scale.to(torch.bfloat16)}
    group = group or pick_group(weight)
    parts = [_int4(part, group) for part in weight.split(max(1, CHUNK // weight.shape[1]))]
    return {"codes": torch.cat([codes for codes, _ in parts]), "grid": torch.cat([grid for _, grid in parts])}


def _int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, grid) of some rows of a weight."""
    codes, grid = round_int4(nn.functional.pad(weight, (0, -weight.shape[1] % group)), group)
    return (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), grid


def fuse(parts: Sequence[StoredLinear], *, consume: bool = False) -> QuantLinear:
    """One computing layer for several over the same input, bit for bit what each holds; `consume` empties them."""
    made = _fused_int8(parts) if parts[0].bits == 8 else _fused_int4(parts)
    for part in parts if consume else ():
        part.empty()
    return made


def _fused_int8(parts: Sequence[StoredLinear]) -> Int8Linear:
    codes, scale = (torch.cat([getattr(part, name) for part in parts]) for name in TENSORS[8])
    return Int8Linear.from_codes(codes, scale, _bias(parts))


def _fused_int4(parts: Sequence[StoredLinear]) -> Int4Linear:
    groups = max(part.groups for part in parts)  # a group with its scale is two of half the size with the same one
    grid = torch.cat([part.grid.repeat_interleave(groups // part.groups, 1) for part in parts])
    pairs = torch.cat([part.codes for part in parts])
    codes = torch.stack((pairs >> 4, pairs & 15), -1).flatten(1)
    return Int4Linear.from_codes(codes, grid, parts[0].in_features, _bias(parts))


def start(model: nn.Module) -> None:
    """Replace the stored layers of a model in place by computing ones, one at a time."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, StoredLinear):
                setattr(module, name, fuse([child]))


def _bias(parts: Sequence[StoredLinear]) -> torch.Tensor | None:
    found = [part.bias for part in parts if part.bias is not None]
    if not found:
        return None
    return torch.cat([found[0].new_zeros(p.out_features) if p.bias is None else p.bias for p in parts]).detach()
