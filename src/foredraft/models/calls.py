"""The native library's functions, with all that stays the same from pass to pass: structures, addresses, tables.

Knows what a pass and a chain are made of, and nothing of where a model's weights come from.
"""

import ctypes
from array import array
from itertools import accumulate

import torch
from torch import nn

from foredraft.errors import CacheMemoryError, ModelError
from foredraft.models.base import Guessing
from foredraft.models.pages import PageCache
from foredraft.models.rows import RowBatch, Span
from foredraft.native import library as native
from foredraft.native.library import Library
from foredraft.policy import StopRule


class Call:
    """The library's functions with all that stays the same from pass to pass."""

    def __init__(self, library: Library, struct: native.Model, rope: "Rope") -> None:
        self.function = library.functions.foredraft_pass
        self.function_of_chains = library.functions.foredraft_chain
        self.struct = struct  # with all that it points to
        self.address = ctypes.addressof(self.struct)
        self.point_to(rope)

    def point_to(self, rope: "Rope") -> None:
        self.length, self.tables = rope.length, (rope.cos, rope.sin)
        self.struct.cos, self.struct.sin = (table.data_ptr() for table in self.tables)

    def __call__(self, ints: "array[int]", rows: RowBatch, spans: int, cache: PageCache, logits: torch.Tensor) -> None:
        status = self.function(
            self.address, ints.buffer_info()[0], len(rows.tokens), spans, len(rows.wanted), cache.address,
            cache.table.shape[1], logits.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if status:
            self._fail(status, rows.tokens)

    def chain(
        self, spans: list[Span], guessing: list[Guessing], rule: StopRule, vocab_size: int, cache: PageCache
    ) -> list[tuple[list[int], list[float]]]:
        """The library's other function, over the same model."""
        count, most = len(spans), max(guess.limit for guess in guessing)
        tokens = [token for span in spans for token in span.tokens]
        places = [number for span in spans for number in (span.slot, span.start, len(span.tokens))]
        ends = [end - 1 for end in accumulate(len(span.tokens) for span in spans)]
        ints = array("i", tokens + places + ends)
        found = array("i", bytes(4 * count * (most + 2)))  # active texts, lengths, tokens
        confidences = array("f", bytes(4 * count * most))
        chains = (native.Chain * count)(*map(_chain, spans, guessing, rule.survivals))
        stop, _alive = _rule(rule)
        address = found.buffer_info()[0]
        status = self.function_of_chains(
            self.address, ints.buffer_info()[0], len(tokens), count, cache.address, cache.table.shape[1], chains,
            stop, address, vocab_size, most, address + 8 * count,
            confidences.buffer_info()[0], address + 4 * count, torch.get_num_threads(),
        )  # fmt: skip
        if status:
            self._fail(status, tokens)
        lengths, drawn = found[count : 2 * count], found[2 * count :]
        cuts = [slice(i * most, i * most + length) for i, length in enumerate(lengths)]
        return [(drawn[cut].tolist(), confidences[cut].tolist()) for cut in cuts]

    def _fail(self, status: int, tokens: list[int]) -> None:
        if status == 1:
            raise CacheMemoryError(f"no memory for a pass of {len(tokens)} rows; lower max_batch_size")
        outside = next(token for token in tokens if not 0 <= token < self.struct.vocab)
        raise ModelError(f"token id {outside} is outside the vocabulary of {self.struct.vocab}")


def _chain(span: Span, guessing: Guessing, survival: float | None) -> native.Chain:
    position = span.start + len(span.tokens)
    survival = -1.0 if survival is None else survival
    return native.Chain(survival, guessing.seed, guessing.sampler.filters, span.slot, position, guessing.limit)


def _rule(rule: StopRule) -> tuple[native.StopRule, tuple["array[float]", ...]]:
    """For the library, as long as the arrays live that come with it."""
    arrays = array("d", rule.chances), array("d", rule.shared), array("d", rule.own)
    addresses = (values.buffer_info()[0] for values in arrays)
    return native.StopRule(*addresses, len(rule.chances), rule.sharing), arrays


class Rope:
    """Cosines and sines of rotary positions in fp32, tabled on demand with the model's own module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.length = 0
        self.cos = self.sin = torch.empty(0)

    def reserve(self, length: int) -> None:
        if length <= self.length:
            return
        self.length = max(length, 2 * self.length, 1024)
        positions = torch.arange(self.length)[None]
        with torch.inference_mode():
            tables = self.module(torch.empty(1, 1, 1, dtype=torch.float32), positions)
        self.cos, self.sin = (t[0, :, : t.shape[2] // 2].float().contiguous() for t in tables)
