"""Which transformers models can serve: causal ones, whose state is keys and values that can be written again.

Owns the refusals and their words. Knows nothing of passes or caches of ours.
"""

import inspect

from transformers import PreTrainedModel

from foredraft.errors import UnsupportedModelError
from foredraft.upstream.caches import cache_argument, is_recurrent, unrewindable_layers

ADVICE = "decode it with transformers' generate(), or choose a target with plain attention (llama, qwen3, gpt2, ...)"
REFUSED = {
    "gpt_neo": "its local attention takes the queries to stand at the end of the cache",
    "mpt": "its position biases depend on how long the longest sequence of the batch is",
    "diffllama": "its attention mixes heads in a way that depends on how keys are laid out",
    "blt": "it reads bytes in patches, through several stacks of layers",
    "cpmant": "it puts tokens of its own before the text in every pass",
    "gpt_neox_japanese": "its attention takes keys only as one block of memory",
    "prophetnet": "its attention predicts several tokens at once, over masks it builds for one token a pass",
    "xlm": "it predicts a token that is masked, not the next one",
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
    if is_recurrent(model):
        return "it keeps a recurrent state, which cannot be rewound after a rejected draft"
    if config.model_type in REFUSED:
        return REFUSED[config.model_type]
    if not model.can_generate() or (getattr(config, "is_decoder", True) is False and _masked(model)):
        return "it is no causal language model (it was built without a causal head)"
    if cache_argument(model) is None:
        return "its forward takes no cache, so there are no keys and values to keep and rewind"
    kinds = ", ".join(unrewindable_layers(config))
    if kinds:
        return f"some of its layers keep state that cannot be rewound after a rejected draft ({kinds})"
    return None


def _masked(model: PreTrainedModel) -> bool:
    """Whether the class is of the kind that attends both ways unless `is_decoder` is set."""
    return "encoder_hidden_states" in inspect.signature(model.forward).parameters and not hasattr(
        model.config, "n_positions"
    )
