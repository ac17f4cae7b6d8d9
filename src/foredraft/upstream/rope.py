"""Rotary embeddings whose frequencies change with the length of the text, held still.

Such frequencies make a row depend on how long its batch mates are, and old keys wrong once a text grows.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

UNLIMITED = 2**62


def pin_rope(model: PreTrainedModel) -> int:
    """Pin dynamic and longrope frequencies to those of short texts; return up to which length they are right.

    They are computed from the configuration: a long pass may have left others in the buffers, and a model that shares
    them may do so any time.
    """
    limit = UNLIMITED
    modules: list[Any] = list(model.modules())
    for module in modules:
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and _changes(kinds):
            limit = min(limit, _pin(module, kinds, None))
            module.rope_type = "default"
        elif isinstance(kinds, dict):  # by kind of layer
            changing = [layer for layer, kind in kinds.items() if isinstance(kind, str) and _changes(kind)]
            limit = min([limit, *(_pin(module, kinds[layer], layer) for layer in changing)])
            module.rope_type = {**kinds, **dict.fromkeys(changing, "default")}
    return limit


def _changes(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _pin(module: Any, kind: str, layer: str | None) -> int:
    """Frequencies of short texts in a buffer of its own; the length up to which texts are short."""
    name = "inv_freq" if layer is None else f"{layer}_inv_freq"
    buffer = getattr(module, name)
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](module.config, buffer.device, layer_type=layer)
    setattr(module, name, nn.Buffer(frequencies.to(buffer), persistent=False))
    parameters = getattr(module.config, "rope_parameters", None) or {}
    own = parameters if layer is None else parameters.get(layer, {})
    return int(own.get("original_max_position_embeddings") or module.original_max_seq_len)
