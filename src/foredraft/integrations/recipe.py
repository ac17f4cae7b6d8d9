"""How a model of the drop-in is made: from a checkpoint or an object in memory, and with which drafter.

Owns loading. Knows nothing of generate().
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedModel

from foredraft.drafters.base import Drafter
from foredraft.drafters.listed import check_place
from foredraft.drafters.make import DraftContext, check_format, make_drafter
from foredraft.drafters.self_draft import SelfDrafter
from foredraft.errors import ModelError, RequestError
from foredraft.models.base import CausalModel, SkipSet
from foredraft.models.load import LoadOptions, load_target, probed, wrap
from foredraft.models.options import parse_device, parse_dtype
from foredraft.models.pretrained import load_tokenizer
from foredraft.policy import DraftPolicy
from foredraft.upstream.modules import unwrapped
from foredraft.weights.checkpoint import explained
from foredraft.weights.lowbit import is_low_bit

DraftSpec = str | Path | PreTrainedModel | Drafter | None
DEFAULT_DRAFT = "int4"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is made, so that it can be made again on another device."""

    source: str | Path | PreTrainedModel
    draft: DraftSpec
    options: LoadOptions
    policy: str | DraftPolicy | None = None
    max_batch_size: int = 8
    draft_profile: str | Path | None = None
    loading: dict[str, Any] = field(default_factory=dict)  # transformers' own options
    skip: SkipSet | None = None  # set by set_skip_layers; used instead of `draft`
    draft_weight_format: str | None = None

    def __post_init__(self) -> None:
        check_format(self.draft_weight_format)
        check_place([unwrapped(self.draft)], None, draft_weight_format=self.draft_weight_format)

    def target(self) -> CausalModel:
        if isinstance(self.source, PreTrainedModel) or not self.loading:
            return load_target(self.source, self.options)
        if is_low_bit(self.source):
            names = ", ".join(self.loading)
            raise RequestError(f"{names} cannot be honoured for low-bit weights in {self.source}; leave them out")
        return probed(wrap(self._with_transformers(), consume=True))

    def _with_transformers(self) -> PreTrainedModel:
        o = self.options
        place = {"device_map": o.device_map} if o.device_map else {}
        dtype = parse_dtype(o.dtype) or "auto"
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        try:
            model = load(self.source, dtype=dtype, trust_remote_code=o.trust_remote_code, **place, **self.loading)
        except TypeError:  # an option that transformers does not know
            raise
        except Exception as error:  # as in load.py
            raise explained(cast(str | Path, self.source), error) from error
        return cast(PreTrainedModel, model if o.device_map else model.to(parse_device(o.device)))

    def own_drafter(self, target: CausalModel) -> Drafter:
        if self.skip is not None:
            return SelfDrafter(target, "skip", skip=self.skip)
        return make_drafter(self.draft, self._context(self.draft, target, self.draft_profile))

    def drafter(self, spec: DraftSpec, target: CausalModel) -> Drafter:
        """The drafter that a call of generate() asks for."""
        return make_drafter(spec, self._context(spec, target))

    def _context(self, spec: DraftSpec, target: CausalModel, profile: str | Path | None = None) -> DraftContext:
        bits = self.draft_weight_format
        return DraftContext(target, self._tokenizer(spec), self.options, profile, weight_format=bits)

    def moved(self, device: torch.device, dtype: torch.dtype) -> "Recipe":
        """The same on another device or in another dtype. Raises RequestError where it is made of objects in memory."""
        if isinstance(self.source, PreTrainedModel) or not isinstance(self.draft, (str, Path, type(None))):
            raise RequestError(
                f"to({device}, {dtype}): this model or its drafter was made from an object in memory; move the object "
                "first, and make this one from it"
            )
        name = str(dtype).removeprefix("torch.")
        return replace(self, options=replace(self.options, device=str(device), dtype=name, device_map=None))

    def _tokenizer(self, spec: DraftSpec) -> Any:
        """The target's tokenizer, to compare its vocabulary with a draft checkpoint's; None if it has none."""
        if isinstance(self.source, PreTrainedModel) or not isinstance(spec, (str, Path)) or not Path(spec).exists():
            return None
        try:
            return load_tokenizer(self.source, self.options)
        except ModelError:
            return None


def draft_of(source: str | Path, speculative: bool | None, draft: DraftSpec) -> DraftSpec:
    """The drafter that `speculative` and `draft` ask for together.

    Raises:
        RequestError: they contradict each other, or ask for a low-bit copy of a low-bit checkpoint.
    """
    if speculative is False:
        if draft is not None:
            raise RequestError(f"speculative=False contradicts draft={draft!r}; drop one of them")
        return None
    if draft is None and is_low_bit(source):
        if speculative:
            raise RequestError(
                f"speculative=True drafts with a 4-bit copy, and {source} holds low-bit weights already; load the "
                "original checkpoint, or name a drafter (draft='ngram', draft='skip')"
            )
        return "ngram"
    return DEFAULT_DRAFT if draft is None else draft
