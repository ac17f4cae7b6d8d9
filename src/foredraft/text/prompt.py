"""Prompts as token ids, and what is text at all."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from foredraft.errors import RequestError


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, with what the tokenizer puts before one. Its length is not checked here.

    Raises:
        RequestError: it is not Unicode text.
    """
    check_unicode(text, "the prompt")
    return list(tokenizer(text, verbose=False)["input_ids"])


def check_unicode(value: object, name: str) -> None:
    """Raises RequestError where `value`, or a string anywhere inside of it, has half of a surrogate pair."""
    for text in _strings(value):
        at = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
        if at is not None:
            raise RequestError(
                f"{name} has a lone surrogate, {text[at]!a} at character {at}, which no tokenizer can read; "
                "decode its source as UTF-8, or replace such characters"
            )


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
