"""How a transformers model is told to call functions of ours: for attention and masks, and for experts."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface

Function = Callable[..., Any]


def use_attention(model: PreTrainedModel, name: str, attention: Function, mask: Function) -> bool:
    """Let a model whose code asks for attention by name call ours. False where it calls its own, or makes no masks."""
    if not model._can_set_attn_implementation():
        return False
    interface: Any = AttentionInterface
    masks: Any = AttentionMaskInterface
    interface.register(name, attention)
    masks.register(name, mask)
    model.set_attn_implementation(name)
    return bool(model.config._attn_implementation == name)


def experts(model: PreTrainedModel) -> list[Any]:
    """The modules that hold all experts of a layer as tensors [experts, ...] and call an experts function by name."""
    if not model._can_set_experts_implementation():
        return []
    return [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "down_proj")]


def expert_parts(module: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """The two products of such a module: the name, the weights [experts, out, in] and the biases [experts, out]."""
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        weight = getattr(module, name)
        yield name, weight.transpose(1, 2) if module.is_transposed else weight, getattr(module, f"{name}_bias", None)


def use_experts(model: PreTrainedModel, name: str, function: Function) -> None:
    ALL_EXPERTS_FUNCTIONS.register(name, function)
    model.set_experts_implementation(name)


def between_products(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What an expert does between its two products."""
    out: torch.Tensor = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    return out


def after_products(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What an expert does after its two products."""
    out: torch.Tensor = module.post_expert_norm(x) if module.has_post_expert_norm else x
    return out


def bare_routers(model: nn.Module) -> Iterator[Any]:
    """Modules that choose experts by a weight [experts, hidden] of their own."""
    for module in model.modules():
        weight = getattr(module, "weight", None) if "Router" in type(module).__name__ else None
        if isinstance(weight, nn.Parameter) and weight.dim() == 2:
            yield module
