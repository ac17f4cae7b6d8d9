"""A constraint that follows a compiled grammar.

One matcher serves all prefixes of a pass: it walks ahead along a draft and is rolled back to what two prefixes share.
"""

from collections.abc import Sequence
from typing import Any

from foredraft.errors import GrammarError
from foredraft.structured.constraint import Bits, Ids
from foredraft.structured.meter import Meter
from foredraft.structured.source import followed


class DeadEndError(GrammarError):
    """No token of the vocabulary goes on as the grammar wants it."""


class GrammarConstraint:
    """The state of one output under a grammar.

    `matcher` (an llguidance `LLMatcher`) has taken in the committed tokens and then those of `ahead`. `ends` are the
    tokens that end a text, the likeliest first: they may come where the grammar is satisfied, and are never fed to it.
    """

    def __init__(
        self, start: Any, ends: tuple[int, ...], tokens: Any, vocab_size: int, meter: Meter | None = None
    ) -> None:
        self.start = start  # a matcher that has taken in nothing; others start from it too
        self.matcher = start.deep_copy()
        self.meter = meter or Meter()
        self.ends = ends
        self.own_end: int = tokens.eos_token  # the one that the matcher itself allows where the grammar is satisfied
        self.all_ends = {self.own_end, *ends}
        self.end_bits = [(token // 8, 1 << token % 8) for token in self.all_ends]  # byte and bit
        self.vocab_size = vocab_size
        self.size = -(-vocab_size // 8)  # of a set, in bytes
        self.nothing = bytes(self.size)
        self.longer = tokens.vocab_size > vocab_size  # the matcher's vocabulary than the model's
        self.committed: list[int] = []
        self.ahead: list[int] = []
        self.known: dict[tuple[int, ...], Bits] = {}  # what may come after paths from the committed output
        self.ended = False

    @property
    def dear(self) -> bool:
        return self.meter.low

    def allowed_after(self, paths: Sequence[Ids]) -> list[Bits]:
        """As `Constraint.allowed_after`.

        Raises:
            GrammarError: no token can come, or the grammar became too complex or too dear to follow.
        """
        return [self._set(tuple(path)) for path in paths]

    def forced(self, limit: int) -> tuple[int, ...]:
        if self.ended or limit < 1:
            return ()
        self._walk(())
        tokens = [int(token) for token in self.meter.timed(self.matcher.compute_ff_tokens)[:limit]]
        room = len(tokens) < limit
        if room and self._walk(tokens) and self.matcher.is_stopped():
            tokens.append(self.ends[0])
        return tuple(tokens)

    def allowed(self, tokens: Ids) -> int:
        end = next((i for i, token in enumerate(tokens) if token in self.all_ends), len(tokens))
        if not self._walk(tokens[:end]):
            return len(self.ahead)
        return end + (end < len(tokens) and contains(self._set(tuple(tokens[:end])), tokens[end]))

    def commit(self, tokens: Ids) -> None:
        text = tokens[:-1] if tokens and tokens[-1] in self.ends else tokens
        if self.ended or not self._walk(text):
            raise GrammarError(f"tokens {list(tokens)} were kept although the grammar does not allow them")
        self.ended = len(text) < len(tokens)
        self.committed += text
        self.ahead.clear()
        self.known.clear()
        self.meter.check()
        self.meter.allow(len(tokens))

    def _set(self, path: tuple[int, ...]) -> Bits:
        found = self.known.get(path)
        if found is None:
            here = not self.ended and self._walk(path)
            found = self.known[path] = self._compute() if here else b"\xff" * self.size
        return found

    def _walk(self, path: Ids) -> bool:
        """Bring the matcher to the committed output and `path`; False where the grammar does not allow that."""
        shared = 0
        if self.ahead:
            while shared < min(len(path), len(self.ahead)) and path[shared] == self.ahead[shared]:
                shared += 1
            self._roll_back(len(self.ahead) - shared)
        if shared == len(path):
            return True
        rest = list(path[shared:])
        taken: int = self.meter.timed(self.matcher.try_consume_tokens, rest)
        self.ahead += rest[:taken]
        if taken < len(rest) and self.matcher.is_error():
            raise self._lost()
        return taken == len(rest)

    def _roll_back(self, count: int) -> None:
        if count:
            self.matcher.rollback(count)
            del self.ahead[-count:]

    def _compute(self) -> Bits:
        """What may come where the matcher is. # [ceil(V / 8)]"""
        self.meter.check()
        bits: Bits = self.meter.timed(self.matcher.compute_bitmask)
        own = self.longer
        for byte, bit in self.end_bits:
            if bits[byte] & bit:
                own = True
        if own:
            if self.matcher.is_error():
                raise self._lost()
            bits = self._own(bytearray(bits))
        if len(bits) > self.size:  # it comes in words of 32
            bits = bits[: self.size]
        if bits == self.nothing:
            raise _dead_end()
        return bits

    def _lost(self) -> GrammarError:
        """Why the matcher gave up, which it never gets over: another goes on from the committed output."""
        message = self.matcher.get_error()
        self.matcher = self.start.deep_copy()
        self.meter.timed(self.matcher.try_consume_tokens, self.committed)
        self.ahead = []
        if message.startswith("NoExtension"):
            return _dead_end()
        return GrammarError(f"the grammar cannot be followed: {followed(message)}")

    def _own(self, bits: bytearray) -> Bits:
        """With the text's ends in place of the matcher's, and without tokens that the model does not have.

        A grammar may name the matcher's end as a token of the text; only where it is satisfied is it the end.
        """
        satisfied = contains(bits, self.own_end) and self.matcher.is_accepting()
        for byte, bit in self.end_bits:
            bits[byte] &= 0xFF ^ bit
        for token in self.ends if satisfied else ():
            bits[token // 8] |= 1 << token % 8
        del bits[self.size :]
        bits[-1] &= 0xFF >> -self.vocab_size % 8
        return bytes(bits)


def contains(bits: Bits | bytearray, token: int) -> bool:
    """Whether a token is in a set. # [ceil(V / 8)]"""
    return bool(bits[token // 8] >> token % 8 & 1)


def _dead_end() -> DeadEndError:
    return DeadEndError(
        "no token of this vocabulary can go on with the text as the grammar wants it; use one that can be "
        "satisfied, with characters that this model has tokens for"
    )
