"""Which transformers models can serve: causal ones, whose state is keys and values that can be written again.

Owns the refusals and their words. Knows nothing of passes or caches of ours.
"""

import inspect

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from foredraft.errors import UnsupportedModelError
from foredraft.models.upstream import cache_argument

REWINDABLE = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
ADVICE = "decode it with transformers' generate(), or choose a target with plain attention (llama, qwen3, gpt2, ...)"
REFUSED = {
    "gpt_neo": "its local attention takes the queries to stand at the end of the cache",
    "mpt": "its position biases depend on how long the longest sequence of the batch is",
    "diffllama": "its attention mixes heads in a way that depends on how keys are laid out",
}


def check_supported(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, which names the model type and says why, unless the model can serve."""
    reason = _refusal(model)
    if reason is not None:
        raise UnsupportedModelError(f"{model.config.model_type!r} cannot serve: {reason}; {ADVICE}")


def _refusal(model: PreTrainedModel) -> str | None:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model, and foredraft decodes causal language models"
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state, which cannot be rewound after a rejected draft"
    if config.model_type in REFUSED:
        return REFUSED[config.model_type]
    if not model.can_generate() or (getattr(config, "is_decoder", True) is False and _masked(model)):
        return "it is no causal language model (it was built without a causal head)"
    if cache_argument(model) is None:
        return "its forward takes no cache, so there are no keys and values to keep and rewind"
    kinds = {type(layer) for layer in DynamicCache(config=config).layers} - set(REWINDABLE)
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        return f"some of its layers keep state that cannot be rewound after a rejected draft ({names})"
    return None


def _masked(model: PreTrainedModel) -> bool:
    """Whether the class is of the kind that attends both ways unless `is_decoder` is set."""
    return "encoder_hidden_states" in inspect.signature(model.forward).parameters and not hasattr(
        model.config, "n_positions"
    )
