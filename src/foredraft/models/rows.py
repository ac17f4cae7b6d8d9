"""The rows of one forward pass: which tokens of which sequences, at which positions, with which padding.

Owns the arithmetic of row invariance: every span gets at least `min_rows` rows, a multiple of `row_multiple`, and
attention a key length rounded up to `key_multiple`. Knows nothing of tensors or models, so that decoder, adapter and
probe plan alike. Named tuples, because each drafted token makes three: a frozen dataclass takes three times as long.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

PREFILL_CHUNK = 256  # tokens of a prompt that one pass takes
SHORT_SPAN = 64  # spans up to here are padded to a common width, so that one attention call serves a whole batch


@dataclass(frozen=True, slots=True)
class RowInvariance:
    """From which shapes on a row's logits are bit-identical whatever else is in the pass.

    A key multiple of 1 says that spans need nothing of each other: none is padded to the width of its neighbours.
    `exact` is False where no such shape was found: steps then run at one fixed width, and only equal passes agree.
    `prefill` says whether a prompt's rows, computed in wide chunks, also agree with rows computed one by one; drafting
    never depends on it, taking over another sequence's cache does.
    """

    min_rows: int = 4
    key_multiple: int = 128
    row_multiple: int = 1
    max_rows: int = 33  # the widest verification pass that was probed
    exact: bool = True
    prefill: bool = False

    @property
    def cuts(self) -> bool:
        """Whether a prompt may be cut into chunks anywhere: its rows need nothing of each other."""
        return self.exact and self.prefill and self.min_rows == self.key_multiple == self.row_multiple == 1

    @property
    def max_draft_tokens(self) -> int:
        return self.max_rows - 1


class Span(NamedTuple):
    """At least one token of a sequence, at positions start, start + 1, ...; logits are wanted for the last `wanted`."""

    slot: int
    start: int
    tokens: Sequence[int]
    wanted: int = 1


class Group(NamedTuple):
    """Spans of equal padded width in consecutive slots: one attention call."""

    first_slot: int
    first_row: int
    width: int
    starts: tuple[int, ...]
    key_length: int

    @property
    def num_rows(self) -> int:
        return self.width * len(self.starts)

    def at_key_length(self, key_length: int) -> "Group":
        return self._replace(key_length=key_length)


class RowBatch(NamedTuple):
    """Everything a model needs for one pass; N rows, padding included.

    Padding rows repeat a span's last token at the positions after it: what they write lies beyond the committed length,
    and is overwritten before any row can see it.
    """

    tokens: list[int]  # [N]
    positions: list[int]  # [N]
    slots: list[int]  # [N]
    wanted: list[int]  # [R] rows whose logits are returned, in the order of the spans
    groups: tuple[Group, ...]

    @property
    def max_position(self) -> int:
        return max([group.key_length for group in self.groups])


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def round_keys(length: int, multiple: int) -> int:
    """A key length whose last block no kernel treats apart.

    CPU attention takes keys in blocks of 512; a last block of 256 sums its products in another order than one of 128,
    384 or 512 (measured, fp32, bf16 and fp16: every row whose keys end there in fp32, 3 in 1,000 in bf16).
    """
    rounded = round_up(length, multiple)
    return rounded if rounded % 512 != 256 else round_up(rounded + 1, max(multiple, 128))


def plan(spans: Iterable[Span], min_rows: int, key_multiple: int, row_multiple: int = 1) -> RowBatch:
    """Lay out spans as rows. Logits come back in the order of `spans`, `wanted` rows each."""
    ordered = list(spans)
    in_order = all([one.slot < other.slot for one, other in pairwise(ordered)])
    if in_order and min_rows == key_multiple == row_multiple == 1:
        return _unpadded(ordered)
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    groups: list[Group] = []
    ends: dict[int, int] = {}  # by slot: the row after its last token
    for run in _runs(ordered, alone=key_multiple == 1):
        longest = max([len(span.tokens) for span in run])
        width = round_up(max(min_rows, longest), row_multiple)
        starts = tuple([span.start for span in run])
        key_length = round_keys(max(starts) + width, key_multiple)
        groups.append(Group(run[0].slot, len(tokens), width, starts, key_length))
        for slot, start, own, _ in run:
            ends[slot] = len(tokens) + len(own)
            tokens += own
            tokens += [own[-1]] * (width - len(own))
            positions += range(start, start + width)
            slots += [slot] * width
    wanted = [row for slot, _, _, count in ordered for row in range(ends[slot] - count, ends[slot])]
    return RowBatch(tokens, positions, slots, wanted, tuple(groups))


def _unpadded(spans: list[Span]) -> RowBatch:
    """What `plan` makes of spans in the order of their slots that need neither padding nor each other."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    wanted: list[int] = []
    groups = []
    for slot, start, own, count in spans:
        width = len(own)
        groups.append(Group(slot, len(tokens), width, (start,), round_keys(start + width, 1)))
        tokens += own
        positions += range(start, start + width)
        slots += [slot] * width
        wanted += range(len(tokens) - count, len(tokens))
    return RowBatch(tokens, positions, slots, wanted, tuple(groups))


def _runs(spans: list[Span], *, alone: bool) -> list[list[Span]]:
    """Sort spans by slot and cut them into runs of consecutive slots; a long span (prefill) stays alone, or all do."""
    if len(spans) == 1:
        return [spans]
    runs: list[list[Span]] = []
    for span in sorted(spans, key=attrgetter("slot")):
        last = runs[-1][-1] if runs else None
        joins = (
            not alone and last and span.slot == last.slot + 1 and max(len(span.tokens), len(last.tokens)) <= SHORT_SPAN
        )
        if joins:
            runs[-1].append(span)
        else:
            runs.append([span])
    return runs
