"""Linear layers in the layout of the native kernels, and back.

Owns which row of which tensor becomes which output; the library moves the weights, straight from where they lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from foredraft.native.library import BLOCK, Format, Library, Linear
from foredraft.weights.memory import WeightMemory
from foredraft.weights.quantize import Quantizer
from foredraft.weights.rounding import check_group, pick_group, round_int4, round_int8
from foredraft.weights.stored import StoredLinear

HALF = BLOCK // 2  # outputs of a vector: gate and up alternate by so many
INT8_GROUP = 64  # inputs that share a scale, in eight bits
FORMATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16}


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Part:
    """Some outputs of a layer: weight [rows, inputs], its last dimension dense, and a bias [rows] or None.

    With a grid the weight is codes, uint8, and means (code - 8) * scale + offset or (code - 128) * scale.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    grid: torch.Tensor | None = None  # [rows, groups, 2] bf16, scale and offset; or [rows, groups, 1], scale


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A packed layer: the memory, and what the kernels are told about it."""

    weights: torch.Tensor  # [outputs / 32, steps, 32] lanes
    bias: torch.Tensor | None  # [outputs] float32
    form: Format
    outputs: int
    inputs: int
    grid: torch.Tensor | None = None
    group: int = 1

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes + (0 if self.grid is None else self.grid.nbytes)

    def struct(self) -> Linear:
        """For the library, as long as this object lives."""
        return Linear(
            self.weights.data_ptr(),
            None if self.grid is None else self.grid.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            self.form,
            self.outputs,
            self.inputs,
            self.group,
        )

    def dense(self) -> torch.Tensor:
        """The weight [outputs, inputs] that is computed with, padding included, in the order of packing.

        As it was for fp32 and bf16; what its codes stand for otherwise, in fp32.
        """
        if self.grid is not None:
            return self._values(self.grid)
        dtype = torch.float32 if self.form == Format.F32 else torch.bfloat16
        return self._unpacked(self.weights.view(dtype))

    def _unpacked(self, elements: torch.Tensor) -> torch.Tensor:
        lanes = elements.view(self.outputs // BLOCK, -1, BLOCK, self.form.inputs_per_lane)
        return lanes.transpose(1, 2).reshape(self.outputs, self.inputs)

    def _values(self, grid: torch.Tensor) -> torch.Tensor:
        elements = self.weights.view(torch.uint8)
        if self.form == Format.INT4:  # four codes in the low halves of a lane's bytes, four in the high ones
            elements = torch.stack((elements & 15, elements >> 4), -1).unflatten(-2, (-1, 4)).transpose(-1, -2)
        codes = self._unpacked(elements.contiguous())
        columns = grid.float().permute(2, 0, 3, 1).reshape(grid.shape[2], self.outputs, -1, 1)
        zero = 8 if self.form == Format.INT4 else 128
        values: torch.Tensor = (codes.unflatten(1, (-1, self.group)).float() - zero) * columns[0]
        return values.add_(columns[1] if len(columns) == 2 else 0).flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Where each output of a layer to be packed lies, 0 for one that is padding; holds on to the memory."""

    addresses: np.ndarray
    bias: torch.Tensor | None
    grid: torch.Tensor | None  # of codes: [outputs, groups, 1 or 2]
    dtype: torch.dtype
    owners: tuple[torch.Tensor, ...]


def stacked(parts: Sequence[Part]) -> Rows:
    """Outputs of several tensors, one after the other."""
    return _rows(parts, [np.arange(start, start + len(part.weight)) for start, part in _numbered(parts)])


def interleaved(gate: Part, up: Part) -> Rows:
    """Gate and up by turns of sixteen, so that one tile of outputs has both."""
    order = [_padded(np.arange(len(gate.weight)) + offset, HALF) for offset in (0, len(gate.weight))]
    turns = np.stack([part.reshape(-1, HALF) for part in order], 1)
    return _rows((gate, up), [turns.reshape(-1)])


def _numbered(parts: Sequence[Part]) -> list[tuple[int, Part]]:
    starts = np.cumsum([0, *(len(part.weight) for part in parts)])
    return [(int(start), part) for start, part in zip(starts, parts, strict=False)]


def _padded(order: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(order, (0, -len(order) % multiple), constant_values=-1)


def _rows(parts: Sequence[Part], order: list[np.ndarray]) -> Rows:
    """Rows in an order of numbers across the parts; -1 is padding."""
    owners = tuple(part.weight if part.weight.stride(1) == 1 else part.weight.contiguous() for part in parts)
    found = [w.data_ptr() + np.arange(len(w), dtype=np.uint64) * w.stride(0) * w.element_size() for w in owners]
    table = np.concatenate([*found, np.zeros(1, np.uint64)]).astype(np.uint64)  # the last one is for -1
    chosen = _padded(np.concatenate(order), BLOCK)
    addresses = np.ascontiguousarray(table[chosen])
    return Rows(addresses, _bias(parts, chosen), _grid(parts, chosen), owners[0].dtype, owners)


def _bias(parts: Sequence[Part], chosen: np.ndarray) -> torch.Tensor | None:
    if all(part.bias is None for part in parts):
        return None
    each = [
        torch.zeros(len(p.weight), dtype=torch.float32) if p.bias is None else p.bias.detach().float() for p in parts
    ]
    return F.pad(torch.cat(each), (0, 1))[torch.from_numpy(chosen)].contiguous()


def _grid(parts: Sequence[Part], chosen: np.ndarray) -> torch.Tensor | None:
    """Of codes, with zeros for padding; parts in larger groups are cut to the size of the smallest."""
    grids = [part.grid for part in parts if part.grid is not None]
    if not grids:
        return None
    groups = max(grid.shape[1] for grid in grids)
    grid = torch.cat([grid.repeat_interleave(groups // grid.shape[1], 1) for grid in grids])
    return F.pad(grid, (0, 0, 0, 0, 0, 1))[torch.from_numpy(chosen)]


def of_stored(layer: StoredLinear) -> Part:
    """A stored layer's codes, one to a byte, and their grid."""
    bias = None if layer.bias is None else layer.bias.detach()
    if layer.bits == 4:
        return Part(torch.stack((layer.codes >> 4, layer.codes & 15), -1).flatten(1), bias, layer.grid)
    codes = (layer.codes.int() + 128).to(torch.uint8)
    codes = F.pad(codes, (0, -codes.shape[1] % INT8_GROUP), value=128)
    return Part(codes, bias, layer.scale.view(-1, 1, 1).repeat(1, codes.shape[1] // INT8_GROUP, 1))


def vector(values: torch.Tensor, size: int) -> torch.Tensor:
    """A norm's weight as the kernels read it: float32, zeros up to `size`."""
    return F.pad(values.detach().float(), (0, size - len(values))).contiguous()


def pack(library: Library, rows: Rows, inputs: int, memory: WeightMemory) -> Packed:
    """A layer of fp32 or bf16 weights, or of codes."""
    if rows.grid is not None:
        return _pack_codes(library, rows, rows.grid, memory)
    form = FORMATS[rows.dtype]
    padded = round_up(inputs, BLOCK)
    out = memory.empty((len(rows.addresses), padded), rows.dtype)
    library.pack(form, rows.addresses, inputs, padded, out.data_ptr(), torch.get_num_threads())
    return Packed(out, rows.bias, form, len(rows.addresses), padded)


def quantized(library: Library, layer: Packed, quantizer: Quantizer, memory: WeightMemory) -> Packed:
    """The same layer in four or eight bits; one that has them stays as it is.

    Raises:
        ModelError: a group size that the kernels lack or that does not divide the layer's input.
    """
    if layer.form not in FORMATS.values():
        return layer
    part = _int4(layer.dense(), quantizer.group) if quantizer.weight_format == "int4" else _int8(layer.dense())
    made = replace(pack(library, stacked([part]), part.weight.shape[1], memory), bias=layer.bias)
    quantizer.nbytes += made.nbytes
    return made


def _int4(weight: torch.Tensor, group: int | None) -> Part:
    group = pick_group(weight) if group is None else check_group(group, weight)
    codes, grid = round_int4(weight, group)
    grid[~weight.any(1)] = 0  # padding stays zero
    return Part(codes, grid=grid)


def _int8(weight: torch.Tensor) -> Part:
    """With a scale for each group, where a stored layer has one for each output."""
    weight = F.pad(weight, (0, -weight.shape[1] % INT8_GROUP))
    codes, scale = round_int8(weight.reshape(-1, INT8_GROUP), torch.bfloat16)
    grid = scale.to(torch.bfloat16).view(len(weight), -1, 1)
    return Part((codes.view_as(weight).int() + 128).to(torch.uint8), grid=grid)


def _pack_codes(library: Library, rows: Rows, grid: torch.Tensor, memory: WeightMemory) -> Packed:
    """Of codes in whole groups; `grid` is [outputs, groups, 1 or 2]."""
    form = Format.INT4 if grid.shape[2] == 2 else Format.INT8
    outputs, inputs = len(rows.addresses), rows.owners[0].shape[1]
    lanes = memory.empty((outputs, inputs // form.inputs_per_lane), torch.int32)
    library.pack(form, rows.addresses, inputs, inputs, lanes.data_ptr(), torch.get_num_threads())
    by_block = grid.view(-1, BLOCK, *grid.shape[1:]).permute(0, 2, 3, 1)
    kept = memory.empty(by_block.shape, grid.dtype).copy_(by_block)
    return Packed(lanes, rows.bias, form, outputs, inputs, kept, inputs // grid.shape[1])
