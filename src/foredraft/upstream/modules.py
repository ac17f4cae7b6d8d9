"""Module objects from the inside: their parts, hooks and forwards, and what other libraries wrap them in."""

import copy
import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")


def is_product(module: object) -> TypeGuard[nn.Linear]:
    """Whether the module is just x W^T + b on a plain weight; subclasses (routers, quantised ones) may do more."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def is_turned(module: object) -> bool:
    """Whether the weight of such a module lies [in, out]."""
    return isinstance(module, Conv1D)


def shell(module: nn.Module) -> Any:
    """Another module object with the same parameters, buffers and attributes, and hooks of its own."""
    other: nn.Module = type(module).__new__(type(module))
    other.__dict__.update(module.__dict__)
    for name in HOOKS:
        other.__dict__[name] = module.__dict__[name].copy()
    return other


def set_children(module: nn.Module, like: nn.Module, make: Callable[[nn.Module], nn.Module]) -> None:
    """Give a module the children of another one, each as `make` returns it."""
    module._modules = {name: child if child is None else make(child) for name, child in like._modules.items()}


def drop_children(module: nn.Module) -> None:
    module._modules = {}


def is_patched(module: nn.Module) -> bool:
    """Whether the object computes something besides its class's forward: hooks, or a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate has spread the model over devices."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in other module objects over the same tensors, without what torch.compile put before them."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    for module in model.modules():
        inner = getattr(module, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            memo[id(module)] = copy.deepcopy(inner, memo)
    other = copy.deepcopy(model, memo)
    for module in other.modules():
        if _is_compiled(module):
            del module.forward
    return other


def left_behind(model: nn.Module) -> str | None:
    """The name of a module of a copied model whose forward still is a function made for the original; None if none.

    A method or a partial is copied with what it is bound to, a closure is not.
    """
    found = (name for name, module in model.named_modules() if isinstance(vars(module).get("forward"), FunctionType))
    return next(found, None)


def _is_compiled(module: nn.Module) -> bool:
    """Whether its forward is what torch.compile made of its class's own."""
    original = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
    return getattr(original, "__func__", None) is type(module).forward


def unwrapped(model: Any) -> Any:
    """The transformers model inside a torch.compile'd module or a PEFT model; anything else as it is."""
    while not isinstance(model, PreTrainedModel):
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif _is_peft(model) and not is_prompt_tuned(model):
            model = model.get_base_model()  # the adapters are inside its modules
        else:
            break
    return model


def _is_peft(model: object) -> bool:
    return any(cls.__module__.startswith("peft.") and cls.__name__ == "PeftModel" for cls in type(model).__mro__)


def is_prompt_tuned(model: object) -> bool:
    """Whether a PEFT model puts virtual tokens before the text, which its base model knows nothing of."""
    config = getattr(model, "active_peft_config", None) if _is_peft(model) else None
    return bool(getattr(config, "is_prompt_learning", False))


def parse_to(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and the dtype in the arguments of a `to` call."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype
