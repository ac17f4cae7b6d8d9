"""A tokenizer's decoder, which says how its tokens become text in no public way but its pickled state."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase


def decoder_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The decoder as JSON has it, `type` and its settings; None where the tokenizer has none."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return None if decoder is None else json.loads(decoder.__getstate__())
