"""Text in and out of token ids: incremental detokenising, stop strings, chat templates.

Owns what a user reads of a request and the rule that ends it at a stop string. Knows tokenizers, and nothing of models,
caches or drafts; that a token was drafted is a flag somebody else hands in to be carried along.
"""

import codecs
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from foredraft.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool")
REPLACEMENT = "\ufffd"
MAX_WAITING = 8  # tokens a window may hold back: the bytes of one character, and some to spare
CONTEXT = 6  # tokens of the prompt that a window decodes along


# --- detokenising ---------------------------------------------------------------------------------------------------


class Detokenizer(Protocol):
    """Token ids in, one at a time; text out, as soon as later tokens can no longer change it."""

    def push(self, token_id: int) -> str:
        """The text that this token settles; a character split over tokens comes with its last one."""
        ...

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never became whole."""
        ...


def detokenizer(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] = ()) -> Detokenizer:
    """What continues the prompt's text, special tokens skipped: `decode(prompt + output) - decode(prompt)`.

    Byte-level BPE and sentencepiece with byte fallback go through their bytes, which is exact at a constant price per
    token; any other decoder (WordPiece, Metaspace, tokenizers written in Python) through a short sliding window.
    """
    special = special_ids(tokenizer)
    scheme = _byte_scheme(tokenizer)
    if scheme is None:
        return WindowDetokenizer(tokenizer, special, prompt_ids)
    return ByteDetokenizer(_piece_of(tokenizer, special, scheme[0]), scheme[1], prompt_ids)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bytes] | None:
    """The bytes of each token; `None` where the tokenizer does not work in bytes."""
    scheme = _byte_scheme(tokenizer)
    return None if scheme is None else _piece_of(tokenizer, frozenset(), scheme[0])


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that are control, not text."""
    added = {token for token, entry in _added_tokens(tokenizer).items() if entry.special}
    return frozenset(added.union(tokenizer.all_special_ids))


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, Any]:
    entries = tokenizer.added_tokens_decoder
    return entries if isinstance(entries, Mapping) else {}  # mistral-common has a method there, which raises


class ByteDetokenizer:
    """Token -> bytes -> UTF-8 -> text. Bytes that are no UTF-8 become U+FFFD, each as soon as it cannot be completed.

    (The `tokenizers` byte fallback instead spoils the whole run of byte tokens around an invalid one, good characters
    included; only there, on text that is no text, the two differ.)
    """

    def __init__(self, piece: Callable[[int], bytes], strip: int, prompt_ids: Sequence[int]) -> None:
        self._piece = piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = 0 if any(map(piece, prompt_ids)) else strip  # spaces that a text of its own loses at its start
        for token_id in prompt_ids[-CONTEXT:]:
            self._utf8.decode(piece(token_id))  # the prompt may end inside a character

    def push(self, token_id: int) -> str:
        return self._stripped(self._utf8.decode(self._piece(token_id)))

    def finish(self) -> str:
        return self._stripped(self._utf8.decode(b"", True))

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            self._strip = self._strip - 1 if text[0] == " " else 0
            text = text.removeprefix(" ")
        return text


class WindowDetokenizer:
    """Decodes the last few tokens twice, without and with the new one; the difference is the new text."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, special: frozenset[int], prompt_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._ids = [token for token in prompt_ids[-4 * CONTEXT :] if token not in special][-CONTEXT:]
        self._settled = len(self._ids)  # of `_ids`: context, whose text is out already

    def push(self, token_id: int) -> str:
        if token_id in self._special:
            return ""
        self._ids.append(token_id)
        text = self._unsettled()
        waits = not text or text.endswith(REPLACEMENT)
        return "" if waits and len(self._ids) - self._settled < MAX_WAITING else self._settle(text)

    def finish(self) -> str:
        return self._settle(self._unsettled())

    def _unsettled(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._settled])) :]

    def _settle(self, text: str) -> str:
        if self._settled < len(self._ids):
            del self._ids[: self._settled]  # what was settled last stays as context: it begins where a character does
            self._settled = len(self._ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _byte_alphabet() -> dict[str, int]:
    """The printable characters by which byte-level BPE writes bytes (GPT-2's `bytes_to_unicode`, inverted)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([BYTE_OF[char] for char in token])
    except KeyError:  # an added token is written as itself
        return token.encode()


def _byte_fallback(token: str, replacements: Sequence[tuple[str, str]]) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    for old, new in replacements:
        token = token.replace(old, new)
    return token.encode()


def _piece_of(
    tokenizer: PreTrainedTokenizerBase, special: frozenset[int], to_bytes: Callable[[str], bytes]
) -> Callable[[int], bytes]:
    id_to_token = tokenizer.backend_tokenizer.id_to_token

    def piece(token_id: int) -> bytes:
        token = None if token_id in special else id_to_token(token_id)
        return b"" if token is None else to_bytes(token)  # models pad their vocabulary with ids that have no token

    return piece


def _byte_scheme(tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[[str], bytes], int] | None:
    """How tokens become bytes, and how many leading spaces fall away; `None` if the decoder does anything more."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    state = json.loads(decoder.__getstate__())
    if state["type"] == "ByteLevel":
        return _byte_level, 0
    steps = state.get("decoders", ())
    replaces = [step for step in steps if step["type"] == "Replace"]
    strips = [step for step in steps if step["type"] == "Strip"]
    kinds = [step["type"] for step in steps]
    known = kinds == ["Replace"] * len(replaces) + ["ByteFallback", "Fuse"] + ["Strip"] * len(strips)
    plain = all("String" in step["pattern"] for step in replaces)
    leading = all(step["content"] == " " and step["stop"] == 0 for step in strips)
    if not (known and plain and leading):
        return None
    table = tuple((step["pattern"]["String"], step["content"]) for step in replaces)
    return lambda token: _byte_fallback(token, table), sum(step["start"] for step in strips)


# --- stop strings ---------------------------------------------------------------------------------------------------


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
    """The text of one request as its tokens arrive, cut before the first stop string.

    `push` is the engine's stop rule. Of several stop strings the one that is complete first counts (of those complete
    with the same character, the longest), so that where the text ends depends on the text and never on how it was cut
    into tokens. Text that may turn out to begin a stop string is withheld until that is decided.

    Without stop strings tokens wait until somebody asks for text, who then hears of a tokenizer that fails: many in a
    row cost less than each within its step.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), prompt_ids: Sequence[int] = ()
    ) -> None:
        self._detokenizer = detokenizer(tokenizer, prompt_ids)
        self._stops = [StopString(text) for text in stop]
        self._waiting: deque[int] = deque()  # tokens that are not in `_parts` yet
        self._parts: list[str] = []  # what each token added; after `close` perhaps one more
        self._num_tokens = 0  # in `_parts`
        self._length = 0  # characters in `_parts`
        self._taken = 0  # of these, handed out
        self._next = (0, 0)  # part and offset of the first character not handed out
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
        self._append("" if self.stopped else self._detokenizer.push(token_id))

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
            if text:
                pieces.append((text, owner < len(from_draft) and from_draft[owner]))
        return tuple(pieces)

    def close(self) -> None:
        """No token follows: nothing is withheld any more. `take` then gives the rest."""
        self._catch_up()
        if not (self._closed or self.stopped):
            self._append(self._detokenizer.finish())
        self._closed = True

    def finish(self) -> str:
        """`close`, and the rest of the text."""
        self.close()
        return self.take()

    @property
    def text(self) -> str:
        """All text so far, up to the stop string; before `close` it includes what is withheld from `take`."""
        self._catch_up()
        return "".join(self._parts)

    @property
    def num_kept_tokens(self) -> int:
        """How many tokens the kept text takes: all of them, or up to the last one with text before the stop string."""
        self._catch_up()
        if not self.stopped:
            return self._num_tokens
        filled = [i + 1 for i, part in enumerate(self._parts) if part]
        return min(max(filled, default=0), self._num_tokens)

    @property
    def _withheld(self) -> int:
        if self._closed or self.stopped:
            return 0
        return max((stop.matched for stop in self._stops), default=0)

    def _append(self, text: str) -> None:
        length, cut = self._scan(text)
        self._parts.append(text[:length])
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
        self._length -= count
        for i in reversed(range(len(self._parts))):
            part = self._parts[i]
            self._parts[i] = part[: max(0, len(part) - count)]
            count -= len(part) - len(self._parts[i])
            if not count:
                return


# --- chat templates -------------------------------------------------------------------------------------------------


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """A conversation as the token ids after which the model's next turn begins.

    Raises:
        RequestError: no template, no messages, an unknown role, content that is not text, or the template refuses.
    """
    if not tokenizer.chat_template:
        raise RequestError("this model's tokenizer has no chat template; pass the text itself to `generate` instead")
    if isinstance(messages, (str, Mapping)) or not messages:
        raise RequestError(
            f"messages={messages!r}: a chat needs at least one {{'role': ..., 'content': ...}} in a list"
        )
    for index, message in enumerate(messages):
        _check_message(index, message)
    ids = _apply_template(tokenizer, messages, tokenize=True)
    if not ids:
        raise RequestError("the chat template renders these messages to nothing; give them some content")
    return [int(token) for token in ids]


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token by which the chat template ends an assistant's turn; empty if there is no template or no such token.

    It is the added token that follows the assistant's words in a rendered dialogue, or opens the next user's turn
    where the template writes none of its own (GLM). A generation_config often lacks it.
    """
    if not tokenizer.chat_template:
        return ()
    marker = "Certainly"
    dialogue = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": marker}]
    for turns in (dialogue, [*dialogue, {"role": "user", "content": "Goodbye"}]):
        try:
            rendered = _apply_template(tokenizer, turns, tokenize=False)
        except RequestError:  # a template with demands of its own; rendering the user's chat will say which
            continue
        rest = rendered.partition(marker)[2].lstrip()
        ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else []
        if ids and ids[0] in _added_tokens(tokenizer):
            return (ids[0],)
    return ()


def _check_message(index: int, message: object) -> None:
    if not isinstance(message, Mapping) or "role" not in message:
        raise RequestError(f"messages[{index}]={message!r} is no {{'role': ..., 'content': ...}}")
    if message["role"] not in ROLES:
        raise RequestError(f"messages[{index}] has role {message['role']!r}; it must be one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise RequestError(f"messages[{index}] has content {message.get('content')!r}; it must be text")


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, tokenize: bool
) -> Any:
    """The dialogue as text, or as token ids that ask for the assistant's next turn."""
    turns = [dict(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(
            turns, add_generation_prompt=tokenize, tokenize=tokenize, return_dict=False
        )
    except Exception as error:  # a template is somebody's program and may raise anything
        raise RequestError(f"the model's chat template refuses these messages: {error}") from error
