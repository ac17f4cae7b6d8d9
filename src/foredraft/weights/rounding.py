"""Rounding a weight to four or eight bits: codes, scales and offsets of the least error, and the size of a group.

Numbers alone. Knows nothing of layers or kernels.
"""

import torch

from foredraft.errors import ModelError
from foredraft.native.library import loaded

GROUPS = (256, 128, 64, 32)
MOST_ERROR = 0.09  # of a layer's weights, relative, in the largest group that may serve
CLIPS = (1.0, 0.92, 0.84)  # shares of a group's range that are tried; the best of them is kept
CHUNK = 2**18  # weights that are rounded at a time: copies that stay in the processor's cache
CHUNK_OF_ALL = 2**23  # the same where all threads of the native library share them


def check_group(group: int, weight: torch.Tensor) -> int:
    """Raises ModelError unless the kernels take this group size for this weight."""
    if group not in GROUPS:
        raise ModelError(f"group size {group} is not usable; the kernels take {', '.join(map(str, sorted(GROUPS)))}")
    if weight.shape[1] % group:
        fits = [str(g) for g in sorted(GROUPS) if weight.shape[1] % g == 0] or [
            "none (leave it out: inputs are padded)"
        ]
        raise ModelError(
            f"group size {group} does not divide a layer's {weight.shape[1]} inputs; sizes that do: {', '.join(fits)}"
        )
    return group


def pick_group(weight: torch.Tensor) -> int:
    """The largest group size that divides the input and keeps the relative error within MOST_ERROR; else 32.

    Speed does not depend on it (docs/self-drafting.md), so it is a matter of memory: 4 + 32 / group bits a weight.
    Judged on a sample of the rows.
    """
    fits = [group for group in GROUPS if weight.shape[1] % group == 0]
    sample = weight.detach()[:: max(1, len(weight) // 64)].float()
    size = sample.norm()
    for group in fits:
        codes, grid = round_int4(sample, group)
        if (values_int4(codes, grid, group) - sample).norm() <= MOST_ERROR * size:
            return group
    return min(fits, default=32)


def round_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0 to 15 [out, in] uint8, and scale and offset [out, in / group, 2] bf16, of the least squared error."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    grid = weight.new_empty(len(weight), weight.shape[1] // group, 2, dtype=torch.bfloat16)
    library = loaded() if weight.is_cpu else None
    step = max(1, (CHUNK if library is None else CHUNK_OF_ALL) // weight.shape[1])
    for part, own_codes, own_grid in zip(weight.split(step), codes.split(step), grid.split(step), strict=True):
        if library is None:
            _by_torch(part, own_codes.view(-1, group), own_grid.view(-1, 2))
        else:
            groups = part.float().reshape(-1, group).contiguous()
            addresses = own_codes.data_ptr(), own_grid.data_ptr()
            library.functions.foredraft_round(
                library.isa(), groups.data_ptr(), len(groups), group, *addresses, torch.get_num_threads()
            )
    return codes, grid


def _by_torch(weight: torch.Tensor, codes: torch.Tensor, grid: torch.Tensor) -> None:
    """Fill in codes [groups, size] and grid [groups, 2] of some rows."""
    found, scale, offset = _round_columns(weight.float().reshape(codes.shape).T.contiguous())
    codes.copy_(found.T)
    grid.copy_(torch.stack((scale, offset), -1))


def _round_columns(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [size, n], scales [n] and offsets [n] of groups that stand in columns, each with its best clip."""
    high, low = x.amax(0), x.amin(0)
    best = torch.full_like(high, torch.inf)
    codes, scales, offsets = torch.zeros_like(x), torch.ones_like(high), torch.zeros_like(high)
    for clip in CLIPS:
        scale = ((high - low) * (clip / 15)).clamp_(min=1e-8).bfloat16().float()
        offset = ((high + low + scale) / 2).bfloat16().float()
        tried = (x - offset).div_(scale).round_().clamp_(-8, 7)
        error = torch.addcmul(offset, tried, scale).sub_(x).square_().sum(0)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
        offsets, codes = torch.where(better, offset, offsets), torch.where(better, tried, codes)
    return codes.add_(8), scales, offsets


def values_int4(codes: torch.Tensor, grid: torch.Tensor, group: int) -> torch.Tensor:
    """The weights [out, in] float32 that codes and grid stand for."""
    scale, offset = grid.float().split(1, -1)
    return torch.addcmul(offset, codes.unflatten(1, (-1, group)).float() - 8, scale).flatten(1)


def round_int8(weight: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes -127 to 127 [out, in] and scales [out] float32, representable in `scale_dtype`."""
    scale = (weight.abs().amax(1).float() / 127).clamp(min=1e-8).to(scale_dtype).float()
    step = max(1, CHUNK // weight.shape[1])
    parts = zip(weight.split(step), scale.split(step), strict=True)
    return torch.cat([(p.float() / s[:, None]).round_().clamp_(-127, 127).to(torch.int8) for p, s in parts]), scale
