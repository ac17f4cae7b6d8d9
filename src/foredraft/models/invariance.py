"""The row-invariance probe: from which shapes on does the loaded model give a row the same bits in every pass?

Measured, never assumed: libraries choose kernels by row count, processor and precision. It works through
`model.forward` alone, on a cache that serves nobody yet, and gives its memory back.
"""

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from foredraft.errors import ExactnessError, ExactnessWarning
from foredraft.models.base import CausalModel
from foredraft.models.rows import PREFILL_CHUNK, SHORT_SPAN, RowInvariance, Span, plan, round_up

ROWS = ((4, 1), (4, 4), (8, 8))  # fewest rows, and the multiple they come in
KEY_MULTIPLES = (128, 512)
WIDTHS = (1, *range(5, 18), 24, 32)  # every narrow one: kernels treat the remainder of a block of rows apart
WIDEST = 33
CONTEXT = 240  # so that the widths above fall on both sides of a key multiple of 128
NEAR, FAR = 180, 300  # how far ahead mates stand: key lengths of 512, and of a second block
KEY_STARTS = (64, 176)  # rows before and after a key length of 128
FIXED = RowInvariance(min_rows=8, key_multiple=512, max_rows=8, exact=False)
"""Where nothing holds, every step runs at this one width: then equal passes agree, and no more is promised."""

MATE, NEIGHBOUR, SLOT = 0, 1, 2  # NEIGHBOUR and SLOT are consecutive, MATE and SLOT are not


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens of the probed sequence, where its rows begin, and where its batch mates must end."""

    tokens: list[int]
    start: int
    widest: int
    limit: int

    def span(self, width: int, offset: int = 0) -> Span:
        first = self.start + offset
        return Span(SLOT, first, self.tokens[first : first + width], width)

    def mate(self, slot: int, width: int, ahead: int = FAR) -> Span:
        return Span(slot, min(self.start + ahead, self.limit - self.widest), self.tokens[:width])


def probe(model: CausalModel) -> RowInvariance:
    """The smallest shapes from which on rows agree bit for bit, or FIXED.

    About 30 passes where the first candidate holds; most that fail do so within three.
    """
    before = model.row_invariance
    text = _text(model)
    try:
        for (min_rows, row_multiple), key_multiple in product(ROWS, KEY_MULTIPLES):
            candidate = RowInvariance(min_rows, key_multiple, row_multiple, max_rows=text.widest)
            model.row_invariance = candidate  # a model may size its own padding by it
            if _holds(model, candidate, text):
                return replace(candidate, prefill=_holds_in_prefill(model, candidate, text))
        return FIXED
    finally:
        model.row_invariance = before
        model.cache.release()


def check_exact(model: CausalModel, *, required: bool = False) -> None:
    """Say so where the probe found no shapes from which on this model's rows agree.

    Raises:
        ExactnessError: `required`, and it found none.
    """
    if model.row_invariance.exact:
        return
    where = f"{model.config.model_type} model in {model.dtype} on {model.device}"
    what = (
        f"no pass widths were found at which this {where} gives a token the same bits whatever else is in the pass, so "
        "drafting and batch mates may change its text where two tokens are nearly tied"
    )
    if required:
        raise ExactnessError(f"require_exact=True: {what}; try dtype='float32' or device='cpu'")
    warnings.warn(f"{what} (docs/lossless.md); LLM(require_exact=True) refuses this", ExactnessWarning, stacklevel=3)


def _holds(model: CausalModel, candidate: RowInvariance, text: Text) -> bool:
    """Whether every pass gives the rows of the probed sequence the bits they have in the widest pass."""
    _forward(model, candidate, [Span(SLOT, 0, text.tokens[: text.start])])
    if not all(_holds_under_longer_keys(model, candidate, text, start) for start in KEY_STARTS):
        return False
    reference = _forward(model, candidate, [text.span(text.widest)])
    if not reference.isfinite().all():
        return False
    return all(
        torch.equal(_forward(model, candidate, spans)[:count], reference[offset : offset + count])
        for offset, count, spans in _cases(candidate, text)
    )


def _holds_under_longer_keys(model: CausalModel, candidate: RowInvariance, text: Text, start: int) -> bool:
    """Whether many rows keep their bits when a mate raises the key length: where they do not, few may show it."""
    tokens = text.tokens[start : min(start + SHORT_SPAN, text.start)]
    if not tokens:
        return True
    span = Span(SLOT, start, tokens, len(tokens))
    alone = _forward(model, candidate, [span])
    beside = (_forward(model, candidate, [span, text.mate(NEIGHBOUR, 1, ahead)]) for ahead in (NEAR, FAR))
    return all(torch.equal(alone, logits[: len(tokens)]) for logits in beside)


def _holds_in_prefill(model: CausalModel, candidate: RowInvariance, text: Text) -> bool:
    """Whether rows of a prompt, computed in one chunk, have the bits of rows computed in a narrow pass."""
    narrow = _forward(model, candidate, [text.span(text.widest)])
    end = text.start + text.widest
    first = max(0, end - PREFILL_CHUNK)
    return torch.equal(_forward(model, candidate, [Span(SLOT, first, text.tokens[first:end], text.widest)]), narrow)


def _forward(model: CausalModel, candidate: RowInvariance, spans: list[Span]) -> torch.Tensor:
    return model.forward(plan(spans, candidate.min_rows, candidate.key_multiple, candidate.row_multiple))


def _cases(candidate: RowInvariance, text: Text) -> Iterator[tuple[int, int, list[Span]]]:
    """Passes whose first logits are those of the probed sequence; from which row of the reference on, and how many."""
    some, multiple = min(5, text.widest), candidate.row_multiple
    for offset in (text.widest - 1, text.widest - some, text.widest // 2):  # backwards, for padding overwrites
        count = min(some, text.widest - offset)
        yield offset, count, [text.span(count, offset)]
    for width in sorted({round_up(width, multiple) - multiple + 1 for width in WIDTHS if width < text.widest}):
        yield 0, width, [text.span(width)]
    yield 0, some, [text.span(some), text.mate(NEIGHBOUR, some, NEAR)]
    yield 0, 1, [text.span(1), text.mate(NEIGHBOUR, text.widest), text.mate(MATE, 2)]
    yield 0, some, [text.span(some), text.mate(NEIGHBOUR, 1), text.mate(MATE, some)]
    yield 0, some, [text.span(some), text.mate(MATE, some)]
    if text.start:  # beside the end of a prompt, as wide as that may be
        yield 0, some, [text.span(some), Span(NEIGHBOUR, 0, text.tokens[: min(SHORT_SPAN, text.start)])]


def _text(model: CausalModel) -> Text:
    """Pseudo-random tokens that fit the model; mates that stand beyond the next key block, where there is room."""
    widest = max(1, min(WIDEST, model.max_positions // 2))
    start = min(CONTEXT, model.max_positions - widest)
    source = random.Random(start)
    return Text([source.randrange(model.vocab_size) for _ in range(start + widest)], start, widest, model.max_positions)
