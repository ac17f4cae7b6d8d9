"""Token ids to text, one at a time, as soon as later tokens can no longer change it.

Knows tokenizers, and nothing of models, caches or drafts.
"""

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from foredraft.upstream.tokenizers import decoder_state

REPLACEMENT = "\ufffd"
MAX_WAITING = 8  # tokens a window may hold back: the bytes of one character, and some to spare
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")  # as sentencepiece writes a bare byte
CONTEXT = 6  # tokens of the prompt that a window decodes along


class Detokenizer(Protocol):
    """Token ids in, one at a time; text out, as soon as later tokens can no longer change it."""

    def push(self, token_id: int) -> str:
        """The text that this token settles; a character split over tokens comes with its last one."""
        ...

    def special(self, token_id: int) -> str:
        """What a special token is written as; "" for a token of text. `push` leaves special tokens out."""
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
    return ByteDetokenizer(_piece_of(tokenizer, scheme[0]), special, scheme[1], prompt_ids)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bytes] | None:
    """The bytes of each token; None where the tokenizer does not work in bytes."""
    scheme = _byte_scheme(tokenizer)
    return None if scheme is None else _piece_of(tokenizer, scheme[0])


def start_spaces(tokenizer: PreTrainedTokenizerBase) -> int:
    """Spaces that the first token of a text begins with and its text has not."""
    scheme = _byte_scheme(tokenizer)
    return 0 if scheme is None else scheme[1]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that are control, not text."""
    added = {token for token, entry in added_tokens(tokenizer).items() if entry.special}
    return frozenset(added.union(tokenizer.all_special_ids))


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, Any]:
    entries = tokenizer.added_tokens_decoder
    return entries if isinstance(entries, Mapping) else {}  # mistral-common has a method there, which raises


class ByteDetokenizer:
    """Token -> bytes -> UTF-8 -> text. Bytes that are no UTF-8 become U+FFFD, each as soon as it cannot be completed.

    (Where byte tokens are not valid UTF-8, `tokenizers` replaces good characters beside them too; here they stay.)
    """

    def __init__(
        self, piece: Callable[[int], bytes], special: frozenset[int], strip: int, prompt_ids: Sequence[int]
    ) -> None:
        self._piece = piece
        self._special = special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        prompt = [token_id for token_id in prompt_ids if token_id not in special]
        self._strip = 0 if any(map(piece, prompt)) else strip  # spaces that the start of a text loses
        for token_id in prompt[-CONTEXT:]:
            self._utf8.decode(piece(token_id))  # the prompt may end inside a character

    def push(self, token_id: int) -> str:
        return "" if token_id in self._special else self._stripped(self._utf8.decode(self._piece(token_id)))

    def special(self, token_id: int) -> str:
        return self._piece(token_id).decode("utf-8", "replace") if token_id in self._special else ""

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
        self._settled = len(self._ids)  # how many of `_ids` are context: their text is out already

    def push(self, token_id: int) -> str:
        if token_id in self._special:
            return ""
        self._ids.append(token_id)
        text = self._unsettled()
        waits = not text or text.endswith(REPLACEMENT)
        return "" if waits and len(self._ids) - self._settled < MAX_WAITING else self._settle(text)

    def special(self, token_id: int) -> str:
        if token_id not in self._special:
            return ""
        before = self._decode(self._ids)
        return self._decode([*self._ids, token_id], skip_special=False)[len(before) :]  # some decoders add a space

    def finish(self) -> str:
        return self._settle(self._unsettled())

    def _unsettled(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._settled])) :]

    def _settle(self, text: str) -> str:
        if self._settled < len(self._ids):
            del self._ids[: self._settled]  # what was settled last stays as context: it begins where a character does
            self._settled = len(self._ids)
        return text

    def _decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))


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
    if BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(token[3:5])
    for old, new in replacements:
        token = token.replace(old, new)
    return token.encode()


def _piece_of(tokenizer: PreTrainedTokenizerBase, to_bytes: Callable[[str], bytes]) -> Callable[[int], bytes]:
    id_to_token = tokenizer.backend_tokenizer.id_to_token

    def piece(token_id: int) -> bytes:
        token = id_to_token(token_id)
        return b"" if token is None else to_bytes(token)  # models pad their vocabulary with ids that have no token

    return piece


def _byte_scheme(tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[[str], bytes], int] | None:
    """How tokens become bytes, and how many leading spaces fall away; `None` if the decoder does anything more."""
    state = decoder_state(tokenizer)
    if state is None:
        return None
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
