"""What tokenizers say of themselves in no public way but their state: decoders, and what they put before a text."""

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

NOTHING_BEFORE: dict[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
}


def decoder_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The decoder as JSON has it, `type` and its settings; None where the tokenizer has none."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return None if decoder is None else json.loads(decoder.__getstate__())


def encoder_within(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Encodes what stands within a text: nothing is put before or after it, and special tokens are text like any."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(post_processor=None, truncation=None, padding=None)
    for part in ("normalizer", "pre_tokenizer"):
        state[part] = _as_it_stands(state[part])
    backend = Tokenizer.from_str(json.dumps(state))
    backend.encode_special_tokens = True
    return lambda text: list(backend.encode(text, add_special_tokens=False).ids)


def _as_it_stands(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer without what it does to the ends of a text; None where nothing is left."""
    if step is None or step["type"] in ("Prepend", "Strip"):
        return None
    if step["type"] == "Sequence":
        parts = next(name for name in ("normalizers", "pretokenizers") if name in step)
        kept = [other for other in map(_as_it_stands, step[parts]) if other is not None]
        return step | {parts: kept} if kept else None
    return step | NOTHING_BEFORE.get(step["type"], {})
