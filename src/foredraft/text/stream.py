"""The text of one request as its tokens arrive, and the stop strings that end it.

Knows nothing of models, caches or drafts; that a token was drafted is a flag that somebody else hands in.
"""

from collections import deque
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from foredraft.text.detokenize import detokenizer


class StopString:
    """Finds one string in a stream of characters (Knuth, Morris, Pratt 1977): no character is looked at twice.

    `matched` is the length of the longest end of the stream that begins the string: what must still be withheld.
    """

    __slots__ = ("_fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._fallback = [0]
        for char in text[1:]:
            self._fallback.append(self._longer(self._fallback[-1], char))

    def feed(self, char: str) -> bool:
        """Whether the string is complete with this character; not to be fed any more after that."""
        self.matched = self._longer(self.matched, char)
        return self.matched == len(self.text)

    def _longer(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._fallback[matched - 1]
        return matched + (self.text[matched] == char)


class TextStream:
    """The text of one request as its tokens arrive, without special tokens, cut before the first stop string.

    `push` is the engine's stop rule. Stop strings are looked for in all that the model wrote, special tokens included
    ("<|end|>\\nUser:" may be one), though only the rest is shown. Of several stop strings the one that is complete
    first counts (of those complete with the same character, the longest): where the text ends depends on the text,
    not on how it was cut into tokens. Text that may begin a stop string is withheld until that is decided.

    Without stop strings tokens wait until somebody asks for text, as many in a row cost less than each within its
    step. A tokenizer that fails is then heard by whoever asks.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), prompt_ids: Sequence[int] = ()
    ) -> None:
        self._detokenizer = detokenizer(tokenizer, prompt_ids)
        self._stops = [StopString(text) for text in stop]
        self._waiting: deque[int] = deque()  # tokens that are not in `_parts` yet
        self._parts: list[str] = []  # what each token added; after `close` perhaps one more
        self._shown: list[bool] = []  # for each part: False is a special token, read for stop strings only
        self._num_tokens = 0  # in `_parts`
        self._length = 0  # characters in `_parts`
        self._taken = 0  # of these, handed out or passed over
        self._next = (0, 0)  # part and offset of the first character not taken
        self._closed = False
        self.stopped = False

    def push(self, token_id: int) -> bool:
        """Add a token. True: a stop string is complete, the text has ended before it; later tokens change nothing."""
        if self._stops:
            self._take_in(token_id)
        else:
            self._waiting.append(token_id)
        return self.stopped

    def _catch_up(self) -> None:
        while self._waiting:
            self._take_in(self._waiting.popleft())

    def _take_in(self, token_id: int) -> None:
        self._num_tokens += 1
        if self.stopped:
            self._append("", shown=True)
            return
        special = self._detokenizer.special(token_id) if self._stops else ""
        self._append(special or self._detokenizer.push(token_id), shown=not special)

    def take(self) -> str:
        """The text that is safe to show and was not handed out yet."""
        return "".join(text for text, _ in self.take_pieces(()))

    def take_pieces(self, from_draft: Sequence[bool]) -> tuple[tuple[str, bool], ...]:
        """`take`, in one piece for each token, with that token's flag; flags are of all tokens pushed so far."""
        self._catch_up()
        pieces = []
        while (safe := self._length - self._withheld - self._taken) > 0:
            index, start = self._next
            text = self._parts[index][start : start + safe]
            self._taken += len(text)
            done = start + len(text) == len(self._parts[index])
            self._next = (index + 1, 0) if done else (index, start + len(text))
            owner = min(index, self._num_tokens - 1)
            if text and self._shown[index]:
                pieces.append((text, owner < len(from_draft) and from_draft[owner]))
        return tuple(pieces)

    def close(self) -> None:
        """No token follows: nothing is withheld any more. `take` then gives the rest."""
        self._catch_up()
        if not (self._closed or self.stopped):
            self._append(self._detokenizer.finish(), shown=True)
        self._closed = True

    def finish(self) -> str:
        """`close`, and the rest of the text."""
        self.close()
        return self.take()

    @property
    def text(self) -> str:
        """All text so far, up to the stop string; before `close` it includes what is withheld from `take`."""
        self._catch_up()
        return "".join(part for part, shown in zip(self._parts, self._shown, strict=True) if shown)

    def length_of(self, count: int) -> int:
        """How many characters of `text` the first so many tokens wrote."""
        self._catch_up()
        parts = zip(self._parts[:count], self._shown[:count], strict=True)
        return sum(len(part) for part, shown in parts if shown)

    @property
    def num_kept_tokens(self) -> int:
        """How many tokens come before the stop string, up to the last one that wrote something; all without one."""
        self._catch_up()
        if not self.stopped:
            return self._num_tokens
        filled = [i + 1 for i, part in enumerate(self._parts) if part]
        return min(max(filled, default=0), self._num_tokens)

    @property
    def _withheld(self) -> int:
        """Characters at the end that may begin a stop string."""
        if self._closed or self.stopped:
            return 0
        return max((stop.matched for stop in self._stops), default=0)

    def _append(self, text: str, *, shown: bool) -> None:
        length, cut = self._scan(text)
        self._parts.append(text[:length])
        self._shown.append(shown)
        self._length += length
        if cut:
            self.stopped = True
            self._drop(cut)

    def _scan(self, text: str) -> tuple[int, int]:
        """How much of `text` to keep, and the length of the stop string that it then ends with."""
        if self._stops:
            for i, char in enumerate(text):
                complete = [len(stop.text) for stop in self._stops if stop.feed(char)]
                if complete:
                    return i + 1, max(complete)
        return len(text), 0

    def _drop(self, count: int) -> None:
        """Take the stop string off the end, over as many parts as it takes."""
        self._length -= count
        for i in reversed(range(len(self._parts))):
            part = self._parts[i]
            self._parts[i] = part[: max(0, len(part) - count)]
            count -= len(part) - len(self._parts[i])
            if not count:
                return
