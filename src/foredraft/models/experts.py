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

from foredraft.upstream import attention as upstream
from foredraft.weights.linear import PackedLinear, can_pack

NAME = "foredraft"
MIN_ROWS = 2  # packed products agree from here on
ROUTER_ROWS = 4


def pack_experts(model: PreTrainedModel) -> None:
    """Pack the experts' weights on a CPU, one expert at a time, and name our function in the configuration."""
    found = [module for module in upstream.experts(model) if _packable(module)]
    for module in found:
        _pack(module)
    if found:
        upstream.use_experts(model, NAME, experts_forward)


def _packable(module: Any) -> bool:
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 3 and can_pack(weight[0])


def _pack(module: Any) -> None:
    for name, weights, biases in list(upstream.expert_parts(module)):
        layers = [PackedLinear(w, None if biases is None else biases[i]) for i, w in enumerate(weights)]
        delattr(module, name)
        setattr(module, name, nn.ModuleList(layers))
        if name != "down_proj":
            module.packed_up = getattr(module, name)


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
        x = self.down_proj[expert](upstream.between_products(self, x))[: len(row)]
        x = upstream.after_products(self, x)
        out.index_add_(0, row, (x * top_k_weights[row, rank, None]).to(out.dtype))
    return out


def pad_routers(model: PreTrainedModel) -> None:
    """Give routers that hold a bare weight [experts, hidden] a multiple of ROUTER_ROWS rows."""
    for module in upstream.bare_routers(model):
        _pad_rows(module)


def _pad_rows(module: Any) -> None:
    original = module.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        count = len(rows)
        out = original(F.pad(rows, (0, 0, 0, -count % ROUTER_ROWS)), *args, **kwargs)
        return out[:count] if isinstance(out, torch.Tensor) else tuple(part[:count] for part in out)

    module.forward = forward
