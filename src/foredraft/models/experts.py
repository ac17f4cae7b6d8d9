"""Mixture-of-experts layers whose rows do not depend on how the other rows were routed.

An expert sees as many rows as chose it, so its products must agree for every row count: packed weights and at least
two rows. Measured in fp32, transformers' "eager" and "grouped_mm" change bits with the routing; its "batched_mm" does
not, but copies the weights for every row: 17 times slower at four rows. Routers that multiply by a bare weight get a
row count that is a multiple of four. Knows nothing of attention.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from foredraft.weights.linear import PackedLinear, can_pack

NAME = "foredraft"
MIN_ROWS = 2  # packed products agree from here on
ROUTER_ROWS = 4


def pack_experts(model: PreTrainedModel) -> None:
    """Pack the experts' weights on a CPU, one expert at a time, and name our function in the configuration."""
    if not model._can_set_experts_implementation():
        return
    experts = [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "down_proj") and _packable(m)]
    if not experts:
        return
    for module in experts:
        _pack(module)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    model.set_experts_implementation(NAME)


def _packable(module: Any) -> bool:
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 3 and can_pack(weight[0])


def _pack(module: Any) -> None:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    for name in (up, "down_proj"):
        weights, biases = getattr(module, name), getattr(module, f"{name}_bias", None)
        layers = [
            PackedLinear(weight.T if module.is_transposed else weight, None if biases is None else biases[i])
            for i, weight in enumerate(weights)
        ]
        delattr(module, name)
        setattr(module, name, nn.ModuleList(layers))
    module.packed_up = getattr(module, up)


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Sum over each row's experts, in the order of the experts: [N, D] -> [N, D]."""
    out = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        row, rank = torch.where(top_k_index == expert)
        x = hidden_states[row]
        padding = max(0, MIN_ROWS - len(row))
        x = self.packed_up[expert](F.pad(x, (0, 0, 0, padding)))
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = self.down_proj[expert](x)[: len(row)]
        x = self.post_expert_norm(x) if self.has_post_expert_norm else x
        out.index_add_(0, row, (x * top_k_weights[row, rank, None]).to(out.dtype))
    return out


def pad_routers(model: PreTrainedModel) -> None:
    """Give routers that hold a bare weight [experts, hidden] a multiple of ROUTER_ROWS rows."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if "Router" in type(module).__name__ and isinstance(weight, nn.Parameter) and weight.dim() == 2:
            _pad_rows(module)


def _pad_rows(module: Any) -> None:
    original = module.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        count = len(rows)
        out = original(F.pad(rows, (0, 0, 0, -count % ROUTER_ROWS)), *args, **kwargs)
        return out[:count] if isinstance(out, torch.Tensor) else tuple(part[:count] for part in out)

    module.forward = forward
