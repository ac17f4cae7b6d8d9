"""A transformers model once more, over the same weights, with some of its modules replaced.

Owns where a decoder layer keeps its attention and its MLP, and what stands in for them when they are skipped. Nothing
of the original is changed or copied but the objects that hold modules. Knows nothing of caches or drafts.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from foredraft.errors import ModelError
from foredraft.models.base import Convert, SkipSet
from foredraft.upstream import modules
from foredraft.weights.quantize import is_linear

ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
ADVICE = "use draft='int4' or 'ngram', or a separate draft model"


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer and its two sub-layers."""

    whole: nn.Module
    attention: nn.Module
    mlp: nn.Module


def find_layers(model: PreTrainedModel, num_layers: int) -> list[Layer]:
    """The decoder layers, in order.

    Raises:
        ModelError: no list of layers with an attention and an MLP module each was found.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            found = [(_child(child, ATTENTION_NAMES), _child(child, MLP_NAMES)) for child in module]
            layers = [
                Layer(whole, attention, mlp)
                for whole, (attention, mlp) in zip(module, found, strict=True)
                if attention is not None and mlp is not None
            ]
            if len(layers) == num_layers:
                return layers
    raise ModelError(
        f"the layers of {model.config.model_type!r} cannot be skipped: they keep no attention module (by one of the "
        f"names {', '.join(ATTENTION_NAMES)}) beside an MLP module ({', '.join(MLP_NAMES)}); {ADVICE}"
    )


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    children = dict(module.named_children())
    return next((children[name] for name in names if name in children), None)


def rebuilt(model: PreTrainedModel, convert: Convert, replaced: dict[int, nn.Module]) -> PreTrainedModel:
    """The model with its linear layers converted, and others replaced (by id). Raises ModelError where it cannot be."""
    if modules.is_spread(model):
        raise ModelError(
            f"this {model.config.model_type} is spread over devices (device_map), and its modules' hooks cannot serve "
            "a draft of it; load it on one device, or use draft='ngram' or a separate draft model"
        )
    made = _rebuilt(model, convert, dict(replaced))
    assert isinstance(made, PreTrainedModel)
    return made


def _rebuilt(module: nn.Module, convert: Convert, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in made:
        if is_linear(module):
            made[id(module)] = convert(module)
        else:
            made[id(module)] = modules.shell(module)
            modules.set_children(made[id(module)], module, lambda child: _rebuilt(child, convert, made))
    return made[id(module)]


def stand_ins(layers: list[Layer], skip: SkipSet, arity: dict[int, int]) -> dict[int, nn.Module]:
    """By the id of each skipped sub-layer, a module that adds nothing. `arity` as `output_arity` finds it."""
    skipped = [layers[i].attention for i in skip.attention] + [layers[i].mlp for i in skip.mlp]
    return {id(module): _stand_in(module, arity[id(module)]) for module in skipped}


def _stand_in(module: nn.Module, arity: int) -> nn.Module:
    """Keeps the module's attributes, which a layer may ask for, but none of its parts."""
    other: Any = modules.shell(module)
    modules.drop_children(other)
    other.forward = _Nothing(list(inspect.signature(module.forward).parameters), arity)
    return other  # type: ignore[no-any-return]


class _Nothing:
    """Zeros like the input, or the residual where the module is the one to add it (bloom); in a tuple if need be."""

    def __init__(self, parameters: list[str], arity: int) -> None:
        self.adds_residual = "residual" in parameters
        self.name = "residual" if self.adds_residual else parameters[0]
        self.place = parameters.index(self.name)
        self.arity = arity

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = kwargs[self.name] if self.name in kwargs else args[self.place]
        out = x if self.adds_residual else torch.zeros_like(x)
        return (out, *[None] * (self.arity - 1)) if self.arity else out


def output_arity(layers: list[Layer], run: Callable[[], object]) -> dict[int, int]:
    """How many things each sub-layer returns, by its id; 0 is a bare tensor. `run` makes a pass of the model."""
    found: dict[int, int] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        found[id(module)] = len(output) if isinstance(output, tuple) else 0

    handles = [module.register_forward_hook(record) for each in layers for module in (each.attention, each.mlp)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def check_identity(layers: list[nn.Module], run: Callable[[], object], model_type: str) -> None:
    """Raise ModelError unless every layer, with both sub-layers skipped, returns its input. `run` makes a pass."""
    changed: list[int] = []

    def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        if not torch.equal(before, after):
            changed.append(layers.index(module))

    handles = [layer.register_forward_hook(compare, with_kwargs=True) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if changed:
        raise ModelError(
            f"the layers of {model_type!r} cannot be skipped: layer {changed[0]} changes the residual stream by more "
            f"than its attention and its MLP add; {ADVICE}"
        )
