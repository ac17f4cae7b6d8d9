"""A model's weights as transformers names, ties and initialises them."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that are another one: its name by theirs."""
    return dict(model.all_tied_weights_keys)


def empty_model(config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The architecture with parameters that take no memory; its buffers, which no checkpoint has, are computed.

    As transformers itself loads a checkpoint: everything is made without memory, then each module initialises what is
    in memory.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    assert isinstance(model, PreTrainedModel)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in model.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]  # it was, without memory
        _give_memory(module)
    model.initialize_weights()
    return model


def _give_memory(module: nn.Module) -> None:
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
