"""Text as bytes, and its spelling in one tokenizer's tokens, wherever within a text it stands.

Knows tokenizers, and nothing of models, caches or drafts.
"""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from foredraft.errors import VocabularyMismatchError
from foredraft.text.detokenize import BYTE_TOKEN, special_ids, start_spaces, token_bytes
from foredraft.upstream.tokenizers import encoder_within


class Speller:
    """One tokenizer's tokens as bytes, and bytes in its tokens.

    Raises:
        VocabularyMismatchError: its tokens are not bytes of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        piece = token_bytes(tokenizer)
        if piece is None:
            raise VocabularyMismatchError(
                f"{type(tokenizer).__name__} does not write text as bytes (byte-level BPE or byte fallback do)"
            )
        self.special = special_ids(tokenizer)
        self.pieces = [b"" if token in self.special else piece(token) for token in range(vocab_size)]  # [V]
        self.start_spaces = start_spaces(tokenizer)
        self._encode = encoder_within(tokenizer)
        self.ids = self._by_bytes(tokenizer)

    def _by_bytes(self, tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
        """The token of each piece; of two that write the same, the one that is no bare byte."""
        found: dict[bytes, int] = {}
        names = tokenizer.convert_ids_to_tokens(list(range(min(len(self.pieces), len(tokenizer)))))
        for token, (name, piece) in enumerate(zip(names, self.pieces, strict=False)):
            if piece and (piece not in found or not BYTE_TOKEN.fullmatch(name or "")):
                found[piece] = token
        return found

    def text(self, tokens: Sequence[int]) -> bytes:
        """What tokens write; special ones nothing."""
        return b"".join([self.pieces[token] for token in tokens])

    def spell(self, data: bytes) -> list[int]:
        """The tokens of a piece of text; what this vocabulary cannot write is left out."""
        tokens: list[int] = []
        for text, stray in _characters(data):
            tokens += [token for token in self._encode(text) if token < len(self.pieces) and self.pieces[token]]
            tokens += [self.ids[byte] for byte in stray if byte in self.ids]
        return tokens


def _characters(data: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Runs of UTF-8, each with the bytes after it that are no whole character."""
    while data:
        try:
            text, stray, data = data.decode(), b"", b""
        except UnicodeDecodeError as error:
            text, stray, data = data[: error.start].decode(), data[error.start : error.end], data[error.end :]
        yield text, [bytes([byte]) for byte in stray]
