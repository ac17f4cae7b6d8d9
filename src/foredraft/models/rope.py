"""Rotary embeddings whose frequencies change with the length of the text, held still.

Such frequencies make a row depend on how long its batch mates are, and old keys wrong once a text grows. Knows nothing
of passes.
"""

from typing import Any

from transformers import PreTrainedModel

UNLIMITED = 2**62


def pin_rope(model: PreTrainedModel) -> int:
    """Pin dynamic and longrope frequencies to those of short texts; return up to which length they are right."""
    limit = UNLIMITED
    modules: list[Any] = list(model.modules())
    for module in modules:
        kinds: Any = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and (kinds == "longrope" or "dynamic" in kinds):
            limit = min(limit, _original_length(module))
            module.rope_type = "default"
        elif isinstance(kinds, dict):
            changing = {k: v for k, v in kinds.items() if isinstance(v, str) and (v == "longrope" or "dynamic" in v)}
            if changing:
                limit = min(limit, _original_length(module))
                module.rope_type = {**kinds, **dict.fromkeys(changing, "default")}
    return limit


def _original_length(module: Any) -> int:
    parameters = getattr(module.config, "rope_parameters", None) or {}
    original = parameters.get("original_max_position_embeddings")
    return int(original or module.original_max_seq_len)
