"""A tokenizer as llguidance sees it: the bytes of every token, which of them are no text, and how a text is spelled.

llguidance's own reader turns the text of a special token ("</s>") into that token, which no grammar allows as text.
"""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foredraft.errors import RequestError, missing_extra


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Any:
    """An `LLTokenizer`; seconds for large vocabularies, so made once.

    Raises:
        RequestError: llguidance is not installed, or cannot read this tokenizer.
    """
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise RequestError(missing_extra("structured output needs", "llguidance", "structured")) from error
    name = type(tokenizer).__name__
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise RequestError(f"structured output cannot read this tokenizer ({name}): only fast tokenizers are supported")
    try:
        return LLTokenizer(Spelling(tokenizer, max(vocab_size, len(tokenizer))))  # type: ignore[arg-type]  # in its shape
    except ValueError as error:
        raise RequestError(f"structured output cannot read this tokenizer ({name}): {error}") from error


class Spelling:
    """What llguidance asks of a tokenizer. A text is spelled in ordinary tokens, whatever it says."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: int) -> None:
        from llguidance import LLTokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        added = {int(token["id"]): str(token["content"]) for token in state["added_tokens"]}
        self.ordinary = LLTokenizer(json.dumps(state | {"added_tokens": [], "padding": None, "truncation": None}))
        self.tokens = [self.ordinary.decode_bytes([token]) for token in range(self.ordinary.vocab_size)]
        self.tokens += [b""] * (max(size, *(token + 1 for token in added)) - len(self.tokens))
        for token, text in added.items():
            self.tokens[token] = text.encode()
        self.special_token_ids = list(added)
        self.texts = added
        self.eos_token_id = _any_end(tokenizer)

    def __call__(self, text: str) -> list[int]:
        """Where an ordinary piece is a special token after all, it is spelled in two parts."""
        ids = self.ordinary.tokenize_str(text)
        for token in ids:
            content = self.texts.get(token, "")
            if len(content) > 1 and content in text:
                at = text.index(content) + 1
                return self(text[:at]) + self(text[at:])
        return ids


def _any_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token by which llguidance says that a grammar is satisfied: a special one, so that it is no text."""
    known = (tokenizer.eos_token_id, *tokenizer.all_special_ids)
    found = next((token for token in known if isinstance(token, int)), None)
    if found is None:
        raise RequestError("structured output needs a tokenizer with a special token, such as its end of sequence")
    return found
