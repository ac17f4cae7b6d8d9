"""The translating drafter: a draft model with another tokenizer than the target's, by way of text.

What is committed is decoded and spelled in the draft's tokens; what is drafted is spelled in the target's (the greedy
way of Timor et al., arXiv 2502.05202). Where a token is drawn, those that both vocabularies have are known by the
target's ids, so that the coupled verifier's noise is the same on both sides. Any proposal is exact: it is verified in
the target's tokens, and a bad translation only gets refused.

For the verifier `rejection`, and where few tokens are shared, the draft's likeliest token is taken instead of a draw: a
one-hot q. A draw would not do for `rejection`, as no q over the target's tokens is known.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from foredraft import sampling
from foredraft.drafters.model import ModelDrafter
from foredraft.drafters.vocabulary import Translation
from foredraft.models.base import CausalModel
from foredraft.models.rows import Span, plan
from foredraft.policy import DraftPolicy
from foredraft.sampling import Drawn
from foredraft.types import Draft, Request, VerifierName

WINDOW = 10  # draft tokens at the end of a text that are spelled anew when it goes on
COUPLED_FROM = 0.5  # share of the target's tokens from which on its noise is used; at 0.1 the likeliest does better
PER_TOKEN = 4  # draft tokens that a target token may take, on average over a draft


class Reading:
    """One request's committed text in the draft's tokens, and what the draft's cache holds of it."""

    __slots__ = ("_begun", "_dropped", "_open", "_read", "cached", "ids", "stable")

    def __init__(self, start: Sequence[int]) -> None:
        self.ids = list(start)
        self.cached: list[int] = []
        self.stable = 0  # the first `stable` ids are those in the cache
        self._open = 0  # how many ids at the end are of one text, without a control token
        self._read = 0  # tokens of the request that are in `ids`
        self._begun = False
        self._dropped = 0  # spaces that the target's tokens begin a text with and the text has not

    def follow(self, tokens: Sequence[int], by: Translation) -> None:
        """Read on, up to the end of the request's `tokens`."""
        text = b""
        for token in tokens[self._read :]:
            if token not in by.target.special:
                text += by.target.pieces[token]
                continue
            self._write(text, by)
            text = b""
            self._mark(by.specials.get(token))
        self._write(text, by)
        self._read = len(tokens)

    def _mark(self, token: int | None) -> None:
        """A control token; None: one that the draft does not have."""
        if token is not None and self.ids != [token]:  # the start of a text is there already
            self.ids.append(token)
            self._open = 0

    def _write(self, text: bytes, by: Translation) -> None:
        if not self._begun:
            bare = _without_spaces(text, by.target.start_spaces - self._dropped)
            self._dropped += len(text) - len(bare)
            text = b" " * by.draft.start_spaces + bare if bare else b""
        if not text:
            return
        self._begun = True
        again = min(self._open, WINDOW)
        kept = len(self.ids) - again
        spelled = by.draft.spell(by.draft.text(self.ids[kept:]) + text)
        self.ids[kept:] = spelled
        self._open += len(spelled) - again
        self.stable = min(self.stable, kept)

    def uncached(self, ids: Sequence[int]) -> int:
        """From where on the cache holds other tokens than `ids`, which begin as the text does."""
        at = min(self.stable, len(ids) - 1)
        while at < min(len(self.cached), len(ids) - 1) and self.cached[at] == ids[at]:
            at += 1
        self.stable, self.cached = len(self.ids), list(ids)
        return at


def _without_spaces(text: bytes, most: int) -> bytes:
    while most and text.startswith(b" "):
        text, most = text[1:], most - 1
    return text


class Passage:
    """The draft of one request while it is made: bytes, and their spelling in the target's tokens."""

    __slots__ = ("_asked", "_by", "_ended", "_starts", "_text", "latest", "lead", "open", "path", "request", "room")

    def __init__(self, request: Request, by: Translation, room: int) -> None:
        self.request, self.lead, self._by = request, request.lead, by
        self.path: list[int] = []  # what was drafted after the forced tokens
        self.room = min(room, PER_TOKEN * (request.draft_limit + 1))  # draft tokens that may still be drawn
        self.latest = -1  # the draft token that the next pass computes
        self.open = self._limit > 0 and self.room > 0
        self._text = b""
        self._starts: list[tuple[int, float]] = []  # of each draft token: where its bytes begin, its probability
        self._asked = 0
        self._ended = False  # by a token that the draft cannot go on from

    @property
    def _limit(self) -> int:
        return self.request.draft_limit - len(self.lead)

    def append(self, drawn: Drawn, policy: DraftPolicy) -> None:
        """Take a column of the translation."""
        self.latest = int(self._by.columns[drawn.token])
        piece = self._by.draft.pieces[self.latest] if self.latest < self._by.draft_size else b""
        self._starts.append((len(self._text), drawn.confidence))
        self._text += piece
        self.path = self._by.target.spell(self._text)
        if not piece:  # a control token, or one that a processor forces and the draft does not know
            self.path.append(drawn.token)
            self._ended = True
        self.room -= 1
        self.open = not self._ended and self.room > 0 and self._goes_on(policy)

    def _goes_on(self, policy: DraftPolicy) -> bool:
        """The last token may yet become a longer one; the policy is asked about each that no longer can."""
        settled = len(self.path) - 1
        if settled >= self._limit:
            return False
        if settled <= self._asked:
            return True
        self._asked = settled
        return policy.go_on(self.request, self._confidences(self.path[:settled]))

    def _confidences(self, path: Sequence[int]) -> tuple[float, ...]:
        """Of each target token: the product over the draft tokens that begin in it."""
        confidences = []
        end, starts = 0, iter(self._starts)
        at, chance = next(starts, (math.inf, 1.0))
        for token in path:
            end += max(1, len(self._by.target.pieces[token]))
            product = 1.0
            while at < end:
                product *= chance
                at, chance = next(starts, (math.inf, 1.0))
            confidences.append(product)
        return tuple(confidences)

    def draft(self, source: str) -> Draft:
        path = self.path[: self._limit]
        tokens = (*self.lead, *path)
        confidences = (1.0,) * len(self.lead) + self._confidences(path)
        name = source if not self.lead else f"forced+{source}" if path else "forced"
        return Draft(tokens, name, confidences=confidences)


class TranslatingDrafter(ModelDrafter):
    """Drafts with a causal model that has a vocabulary of its own."""

    def __init__(self, model: CausalModel, by: Translation, name: str = "model") -> None:
        super().__init__(model, by.target_size, name)
        self.by = by
        self.columns = by.columns.to(model.device)
        self.overlap = by.overlap
        coupled = self.overlap.of_target >= COUPLED_FROM
        self.argmax: tuple[VerifierName, ...] = ("rejection",) if coupled else ("rejection", "coupled")
        self.readings: dict[Request, Reading] = {}

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        passages = {s: self._passage(s) for s in requests if s.draft_limit and s not in self.given_up}
        active = [passage for passage in passages.values() if passage.open]
        spans = [self._read(passage) for passage in active]
        while active:
            for passage, drawn in zip(active, self._draw(spans, active), strict=True):
                self._extend(passage, drawn, policy)
            active = [passage for passage in active if passage.open]
            spans = [self._write(passage) for passage in active]
        return [passages[s].draft(self.name) if s in passages else Draft(source=self.name) for s in requests]

    def _passage(self, request: Request) -> Passage:
        reading = self.readings.setdefault(request, Reading(self.by.start))
        reading.follow(request.token_ids, self.by)
        ids = len(reading.ids)
        return Passage(request, self.by, self.model.max_positions - ids - len(request.lead) if ids else 0)

    def _read(self, passage: Passage) -> Span:
        reading = self.readings[passage.request]
        ids = reading.ids + self.by.draft.spell(self.by.target.text(passage.lead))
        new, start = not reading.cached, reading.uncached(ids)
        if new or start:
            start = self._shared(passage.request, ids, start)
        return self._feed(passage.request.slot, start, ids)

    def _write(self, passage: Passage) -> Span:
        cached = self.readings[passage.request].cached
        cached.append(passage.latest)
        return Span(passage.request.slot, len(cached) - 1, [passage.latest])

    def _draw(self, spans: list[Span], passages: list[Passage]) -> list[Drawn | None]:
        """A column for each. Processors and grammars judge the target's tokens, so that only shared ones remain."""
        logits = self.model.forward(plan(spans, 1, self.key_multiple))[:, : self.by.draft_size]
        scores = F.pad(logits, (0, 1), value=-torch.inf).index_select(1, self.columns)
        guesses: list[Drawn | None] = [None] * len(passages)
        for steered, width in ((False, scores.shape[1]), (True, self.vocab_size)):
            rows = [i for i, passage in enumerate(passages) if passage.request.steering.active == steered]
            if rows:
                own = [passages[i] for i in rows]
                paths = [(*passage.lead, *passage.path) for passage in own]
                drawn = sampling.draw(scores[rows, :width], [p.request for p in own], paths, argmax=self.argmax)
                for row, guess in zip(rows, drawn, strict=True):
                    guesses[row] = None if steered and _nothing_left(guess, logits[row]) else guess
        return guesses

    def forget(self, request: Request) -> None:
        if self.readings.pop(request, None) is not None:
            self.model.cache.free(request.slot)
        self.given_up.discard(request)


def _nothing_left(guess: Drawn | None, logits: torch.Tensor) -> bool:
    """Whether a grammar or processor allows nothing that the draft knows, while its logits [V] are numbers."""
    return guess is not None and math.isnan(guess.confidence) and math.isfinite(float(logits.amax()))
