"""Random numbers without state: each is a pure function of (seed, position, token id, stream).

A generator that is *advanced* gives other numbers when a step checks five tokens than when it checks one. A function
of seed and place gives the same ones whoever asks, in whatever order, on whatever device. Python mixes (seed, position,
stream) into a 64-bit key a row (splitmix64, Steele et al. 2014); torch mixes that key with each token's own 64-bit
hash, in integer operations that are exact everywhere. Knows nothing of models, requests or probabilities.
"""

import functools
import math
from collections.abc import Sequence
from enum import IntEnum

import torch

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SMALLEST = 2.0**-53  # uniforms stay this far from 0 and 1, so that no logarithm of them is infinite or zero


class Stream(IntEnum):
    """What a number is for: numbers of different streams are independent."""

    TOKEN = 0  # the target's choice, and a drafter's coupled one
    DRAFT = 1  # a drafter's choice when the verifier is `rejection`
    ACCEPT = 2
    RESIDUAL = 3
    BONUS = 4


def _signed(value: int) -> int:
    """The same 64 bits, as torch's int64 reads them."""
    return value - 2**64 if value >= 2**63 else value


def mix(value: int) -> int:
    """Splitmix64's output function: a bijection of 64-bit integers in which every input bit moves every output bit."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def fold(seed: int, value: int) -> int:
    """A new seed from a seed and an integer: numbers under it are independent of those under any other."""
    return mix(mix(seed & _MASK) + value)


@functools.lru_cache(maxsize=16)
def _vocabulary_hashes(vocab: int, device: torch.device) -> torch.Tensor:
    """A 64-bit hash of every token id. # [V] int64, not to be written to"""
    return _mix_tensor(torch.arange(vocab, dtype=torch.int64, device=device))


def _mix_tensor(values: torch.Tensor) -> torch.Tensor:
    """`mix`, elementwise. # int64 of any shape"""
    mixed: torch.Tensor = values + _signed(_GOLDEN)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    return mixed ^ _shifted(mixed, 31)


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical right shift: torch's is arithmetic and would copy the sign bit in."""
    shifted: torch.Tensor = (values >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _row_keys(seeds: int | Sequence[int], positions: Sequence[int], stream: int, device: torch.device) -> torch.Tensor:
    """One key a row. # [n, 1] int64"""
    if isinstance(seeds, int):
        start = fold(seeds, stream)
        keys = [mix(start + position) for position in positions]
    else:
        keys = [mix(fold(seed, stream) + position) for seed, position in zip(seeds, positions, strict=True)]
    return torch.tensor([_signed(key) for key in keys], dtype=torch.int64, device=device).unsqueeze(1)


def uniform(
    seeds: int | Sequence[int],
    positions: Sequence[int],
    tokens: int | torch.Tensor,
    stream: int = Stream.TOKEN,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Uniform numbers in (0, 1), one for each position and token. # [n, V] or [n, k] float64

    Args:
        seeds: one for all rows, or one a row.
        positions: absolute position of the token each row decides. # [n]
        tokens: the size V of a vocabulary, for all of its ids, or chosen ids of shape [k] or [n, k].
        stream: what the numbers are for.
        device: where to build them, when `tokens` is no tensor.
    """
    return _unclamped(seeds, positions, tokens, stream, device).clamp_(_SMALLEST, 1 - _SMALLEST)


def _unclamped(
    seeds: int | Sequence[int],
    positions: Sequence[int],
    tokens: int | torch.Tensor,
    stream: int,
    device: torch.device | str,
) -> torch.Tensor:
    """Uniform numbers in [0, 1], ends included. # [n, V] or [n, k] float64

    Only exact operations: two rounds of multiply and fold, a conversion, and a product with a power of two. The
    arithmetic shift costs one of the 64 bits and saves a pass over memory.
    """
    hashes = _token_hashes(tokens, torch.device(device))
    bits: torch.Tensor = hashes ^ _row_keys(seeds, positions, stream, hashes.device)
    bits = bits.mul_(_signed(_FIRST))
    bits = bits.bitwise_xor_(bits >> 32).mul_(_signed(_SECOND))
    return bits.to(torch.float64).mul_(2.0**-64).add_(0.5)


def _token_hashes(tokens: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """# [V], or the shape of `tokens`; int64"""
    if isinstance(tokens, int):
        return _vocabulary_hashes(tokens, device)
    return _mix_tensor(tokens.to(torch.int64))


def exponential(
    seeds: int | Sequence[int],
    positions: Sequence[int],
    tokens: int | torch.Tensor,
    stream: int = Stream.TOKEN,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Exponential(1) numbers, in [2**-53, 36.74]; arguments as for `uniform`. # [n, V] or [n, k] float32

    The logarithm is taken in float64 and rounded, so that mathematical libraries which differ in its last bit agree
    on the float32, all but about one time in 2**28.
    """
    logs = _unclamped(seeds, positions, tokens, stream, device).log_().to(torch.float32)
    return logs.neg_().clamp_(_SMALLEST, -math.log(_SMALLEST))
