"""Which layers of a model are kept in few bits, and a model in memory with these layers so.

Knows nothing of files, kernels and runtimes.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from foredraft.upstream.modules import is_product, is_turned
from foredraft.upstream.weights import tied_weights
from foredraft.weights.stored import StoredLinear, quantize_weight

BITS = {"int4": 4, "int8": 8}
HEAD_BITS = 8  # in either format: its errors go straight to the logits
FEWEST_OUTPUTS = 8  # narrower layers are gates, whose errors cost more than their bytes


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer that is quantised; `turned` where its weight lies [in, out], as Conv1D has it."""

    bits: int
    shape: tuple[int, int]  # [out, in]
    turned: bool


def chosen_layers(model: PreTrainedModel, bits: int) -> dict[str, Layer]:
    """The linear layers of the decoder, and the head where it shares its weight with nothing."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    stacks = [f"{n}." for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    head = model.get_output_embeddings()
    tied = tied_weights(model)
    found: dict[str, Layer] = {}
    for name, module in model.named_modules():
        alone = is_product(module) and f"{name}.weight" not in tied
        if not alone or not (module is head or name.startswith(tuple(stacks))):
            continue
        turned = is_turned(module)
        rows, columns = reversed(module.weight.shape) if turned else module.weight.shape
        if rows >= FEWEST_OUTPUTS:
            found[name] = Layer(HEAD_BITS if module is head else bits, (rows, columns), turned)
    _warn_of_the_rest(model, sum(rows * columns for rows, columns in (layer.shape for layer in found.values())))
    return found


def _warn_of_the_rest(model: PreTrainedModel, quantised: int) -> None:
    """Say so where most weights are in something else, such as experts that are one tensor."""
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    rest = model.num_parameters() - sum(tables.values()) - quantised
    if rest > quantised:
        kind = model.config.model_type
        warnings.warn(f"{rest:,} weights of {kind!r} are not in linear layers, and stay in 16 bits", stacklevel=4)


@torch.no_grad()
def quantise(model: PreTrainedModel, weight_format: str, dtype: torch.dtype) -> None:
    """Replace the chosen layers in place, one at a time, by what `convert` stores of them; the rest gets `dtype`."""
    for name, layer in chosen_layers(model, BITS[weight_format]).items():
        linear: Any = model.get_submodule(name)
        weight = linear.weight.detach()
        tensors = quantize_weight(weight.T if layer.turned else weight, layer.bits)
        _replace(model, name, StoredLinear(tensors, layer.shape[1], linear.bias))
    tied = tied_weights(model)
    for name, parameter in list(model.named_parameters()):  # one that is shared with another model stays as it is
        if parameter.dtype != dtype and name not in tied:
            _replace(model, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    model.tie_weights()


def _replace(model: nn.Module, name: str, by: nn.Module | nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, by)
