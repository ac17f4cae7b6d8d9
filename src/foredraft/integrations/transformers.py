"""The drop-in: models from `AutoModelForCausalLM` and `accelerate` have transformers' `generate`, and are faster.

An option that has no effect here is refused, by name.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from foredraft.drafters.listed import check_profile
from foredraft.errors import RequestError
from foredraft.integrations.model import SpeculativeModel
from foredraft.integrations.recipe import DEFAULT_DRAFT, DraftSpec, Recipe, draft_of
from foredraft.integrations.refusals import LOW_BIT_TARGET, loading_dtype, loading_place
from foredraft.models.load import LoadOptions
from foredraft.policy import DraftPolicy
from foredraft.upstream.modules import unwrapped

__all__ = ["AutoModelForCausalLM", "SpeculativeModel", "accelerate"]


class AutoModelForCausalLM:
    """Stands where transformers' or IPEX-LLM's class of this name stood."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        load_in_low_bit: str | None = None,
        optimize_model: bool = True,
        speculative: bool | None = None,
        draft: DraftSpec = None,
        draft_profile: str | Path | None = None,
        draft_weight_format: str | None = None,
        policy: str | DraftPolicy | None = None,
        trust_remote_code: bool = False,
        use_cache: bool = True,
        device_map: Any = None,
        max_batch_size: int = 8,
        **loading: Any,
    ) -> SpeculativeModel:
        """Load a checkpoint to generate with.

        Args:
            pretrained_model_name_or_path: a folder or a hub name.
            dtype, torch_dtype: as in transformers; by default the checkpoint's own.
            load_in_low_bit: "bf16" or "fp16": the same as a dtype.
            optimize_model, use_cache: IPEX-LLM's; always on.
            speculative: False decodes plainly. True, and None where the checkpoint is not low-bit, drafts.
            draft: who drafts; as `foredraft.LLM` takes it. By default "int4", the model's own weights in 4 bits.
            draft_profile: of a skip draft, which sub-layers it skips; by default the one kept for this model.
            draft_weight_format: bits of a draft model, of `assistant_model` too; as `foredraft.LLM` takes it.
            policy: how far to draft; as `foredraft.LLM` takes it.
            trust_remote_code, device_map: as in transformers. Without a device map the model is on the CPU.
            max_batch_size: rows that run at once; others wait.
            loading: transformers' other options (revision, cache_dir, local_files_only, ...).

        Raises:
            ModelError: the checkpoint does not load, or cannot serve.
            RequestError: an option cannot be honoured.
        """
        for name, value in (("optimize_model", optimize_model), ("use_cache", use_cache)):
            if value is not True:
                raise RequestError(f"{name}={value!r} cannot be honoured: it is always on here; leave it out")
        for name in ("load_in_4bit", "load_in_8bit"):
            if loading.pop(name, None):
                raise RequestError(f"{name}=True cannot be honoured: {LOW_BIT_TARGET}")
        source = pretrained_model_name_or_path
        device, placement = loading_place(device_map)
        options = LoadOptions(loading_dtype(dtype, torch_dtype, load_in_low_bit), device, placement, trust_remote_code)
        spec = draft_of(source, speculative, draft)
        check_profile([spec], draft_profile)
        return SpeculativeModel(
            Recipe(
                source,
                spec,
                options,
                policy,
                max_batch_size,
                draft_profile,
                loading,
                draft_weight_format=draft_weight_format,
            )
        )


def accelerate(
    model: PreTrainedModel,
    draft: DraftSpec = DEFAULT_DRAFT,
    *,
    draft_profile: str | Path | None = None,
    draft_weight_format: str | None = None,
    policy: str | DraftPolicy | None = None,
    max_batch_size: int = 8,
) -> SpeculativeModel:
    """Wrap a transformers model that is already in memory: the same `generate`, faster.

    The model itself is not changed. If its weights change later, wrap it again: packed weights are copies.

    Raises:
        ModelError: the model cannot serve.
    """
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise RequestError(
            f"accelerate({model!r}): give a transformers model in memory, or load one with "
            "foredraft.integrations.transformers.AutoModelForCausalLM.from_pretrained"
        )
    options = LoadOptions(dtype=str(model.dtype).removeprefix("torch."), device=str(model.device))
    return SpeculativeModel(
        Recipe(model, draft, options, policy, max_batch_size, draft_profile, draft_weight_format=draft_weight_format)
    )
