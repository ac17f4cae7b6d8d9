"""Attention and masks for modules written by transformers, as functions they know by the name "foredraft".

A transformers model builds its masks (causal, sliding, chunked; a kind of layer each) from its own index functions, and
calls the attention function that its configuration names. Ours evaluates those index functions at the true position
of every row, so that sequences of different lengths share a pass, and folds a group of query heads into the rows of
their key-value head instead of copying keys. Knows nothing of slots or of any one model.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import nn

from foredraft.models.rows import SHORT_SPAN, round_up

NAME = "foredraft"
ROW_BLOCK, ROW_MULTIPLE = 32, 8  # of query rows: what a CPU's kernel takes at once, and what ours are padded to

KEY_BLOCK = 512  # keys that a product takes in fp32, where it is one: see `_blocked`

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def query_rows(rows: int, apart: int) -> int:
    """How many query rows a call should have instead of `rows`, of each of `apart` texts and key heads.

    A CPU's kernel takes 32 rows at once. In a last block of one to three every row has other bits in fp32, and in bf16
    one in 60 to 400 for each head. Where there is one block in all, its products are spread over the threads, which
    changes as many.
    """
    if rows % ROW_BLOCK in (1, 2, 3):
        rows = round_up(rows, ROW_MULTIPLE)
    return ROW_BLOCK + ROW_MULTIPLE if apart == 1 and rows <= ROW_BLOCK else rows


def additive_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **_unused: object,
) -> torch.Tensor:
    """Additive mask [B, 1, W, K]; `q_offset` is a number, or the first position [B] of each sequence's rows."""
    batch = torch.arange(batch_size, device=device).view(-1, 1, 1, 1)
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    first = torch.as_tensor(q_offset, device=device).view(-1, 1, 1, 1)
    rows = (first + torch.arange(q_length, device=device).view(1, 1, -1, 1)).expand(batch_size, 1, -1, 1)
    keys = kv_offset + torch.arange(kv_length, device=device).view(1, 1, 1, -1)
    allowed = keys <= rows if mask_function is None else mask_function(batch, head, rows, keys)
    mask = torch.zeros(batch_size, 1, q_length, kv_length, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def attention(
    module: nn.Module,
    query: torch.Tensor,  # [B, H, W, D]
    key: torch.Tensor,  # [B, H_kv, K, D]
    value: torch.Tensor,  # [B, H_kv, K, D_v]
    attention_mask: torch.Tensor | None,  # [B, 1, W, K]
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """Masked attention [B, W, H, D_v], in the signature transformers' models call."""
    assert attention_mask is not None, "the adapter always masks"
    batch, heads, width, _ = query.shape
    mask = attention_mask if position_bias is None else attention_mask + position_bias
    groups = heads // key.shape[1]
    if groups > 1 and width > SHORT_SPAN:  # copying keys costs little beside so many rows, a folded mask much
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    rows = groups * width
    padding = (0, 0, 0, query_rows(round_up(rows, ROW_MULTIPLE), batch * heads // groups) - rows)
    folded = F.pad(query.reshape(batch, heads // groups, rows, -1), padding)
    mask = F.pad(_fold_mask(mask, groups), padding)
    if softcap is None and s_aux is None:
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    else:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        sinks = None if s_aux is None else _fold_sinks(s_aux, groups, width, folded.shape[2])
        out = _eager(folded, key, value, mask, scale, softcap, sinks)
    return out[:, :, :rows].reshape(batch, heads, width, -1).transpose(1, 2).contiguous(), None


def _fold_mask(mask: torch.Tensor, groups: int) -> torch.Tensor:
    if groups == 1:
        return mask
    if mask.shape[1] == 1:
        return mask.repeat(1, 1, groups, 1)
    return mask.reshape(mask.shape[0], mask.shape[1] // groups, groups * mask.shape[2], -1)


def _fold_sinks(sinks: torch.Tensor, groups: int, width: int, rows: int) -> torch.Tensor:
    """A sink's score for each query row, [1, H_kv, rows, 1]."""
    folded = sinks.view(-1, groups, 1).expand(-1, -1, width).flatten(1)
    return F.pad(folded, (0, rows - folded.shape[1]))[None, :, :, None]


def _eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What fused kernels lack: capped scores (gemma2) and a learned sink that takes probability (gpt-oss)."""
    scores = _products(query, key) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(len(scores), -1, -1, -1).to(scores.dtype)], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32)[..., : key.shape[2]].to(value.dtype)
    return _sums(weights, value)


def _blocked(rows: torch.Tensor) -> bool:
    """Whether to compute in products of one shape: in fp32 a CPU's library sums in an order that depends on it."""
    return rows.dtype == torch.float32 and rows.device.type == "cpu"


def _products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Of each row with each key. # [B, H, R, D], [B, H, K, D] -> [B, H, R, K]"""
    if not _blocked(query):
        return torch.matmul(query, key.transpose(2, 3))
    blocks = [block.transpose(2, 3) for block in key.split(KEY_BLOCK, 2)]
    parts = [torch.cat([torch.matmul(rows, block) for block in blocks], 3) for rows in query.split(ROW_MULTIPLE, 2)]
    return torch.cat(parts, 2)


def _sums(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of the values by each row's weights, block after block. # [B, H, R, K], [B, H, K, D] -> [B, H, R, D]"""
    if not _blocked(weights):
        return torch.matmul(weights, value)
    blocks = value.split(KEY_BLOCK, 2)
    return torch.cat([_sum(rows.split(KEY_BLOCK, 3), blocks) for rows in weights.split(ROW_MULTIPLE, 2)], 2)


def _sum(weights: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> torch.Tensor:
    parts = (torch.matmul(own.contiguous(), block) for own, block in zip(weights, values, strict=True))
    return reduce(torch.add, parts)
