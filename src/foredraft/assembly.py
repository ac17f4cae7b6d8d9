"""What an LLM is made of: its arguments, checked before anything is loaded, and then target, drafter and engine.

Knows nothing of requests.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foredraft.admission import CacheLimits, check_limits
from foredraft.drafters.listed import automatic, check_listed, check_place, check_profile, make_drafters
from foredraft.drafters.make import DraftContext, DraftSpec, check_format
from foredraft.drafters.several import Several
from foredraft.engine import Engine
from foredraft.errors import RequestError
from foredraft.models.cache import GRANULE
from foredraft.models.invariance import check_exact
from foredraft.models.load import LoadOptions, load_target, model_or_name
from foredraft.models.options import check_least, check_length
from foredraft.models.pretrained import find_tokenizer
from foredraft.models.rows import round_up
from foredraft.policy import DraftPolicy, make_policy
from foredraft.text import read_template
from foredraft.types import is_whole
from foredraft.upstream.modules import unwrapped

BUNDLED = Path(__file__).parent / "bundled"
SHORTEST = 2  # tokens of a text: one to begin with, one to give


def bundled_draft(target: object) -> Path | None:
    """The folder of the draft model that came with this target; None for any but the bundled one, however named."""
    if target is None:
        return BUNDLED / "draft"
    if not isinstance(target, str | Path):
        return None
    try:
        named = os.path.samefile(os.path.expanduser(target), BUNDLED / "target")
    except (OSError, ValueError):  # a hub name, or no path at all
        return None
    return BUNDLED / "draft" if named else None


@dataclass(frozen=True, slots=True)
class Room:
    """Of an LLM's batch, context and caches, as `LLM` documents them."""

    max_model_len: int | None = None
    max_batch_size: int = 8
    cache_bytes: int | None = None
    prefix_cache: bool | int = True

    def __post_init__(self) -> None:
        check_limits(self.cache_bytes, self.prefix_cache)
        if not is_whole(self.max_batch_size, 1):
            raise RequestError(f"max_batch_size={self.max_batch_size!r} is not usable; it must be 1 or more, and whole")

    def context(self, most: int) -> int:
        """Tokens of prompt and output together; the model allows `most`."""
        if self.max_model_len is None:
            return most
        check_length(self.max_model_len, most)
        return self.max_model_len


@dataclass(frozen=True, slots=True)
class DraftWishes:
    """Who drafts and by which rule, as `LLM` documents it."""

    draft: DraftSpec | Sequence[DraftSpec] = "auto"
    dtype: str | torch.dtype | None = None
    device: str | None = None
    profile: str | Path | None = None
    force_profile: bool = False
    policy: str | DraftPolicy | None = None
    weight_format: str | None = None

    @property
    def drafts(self) -> list[DraftSpec]:
        return [unwrapped(it) for it in (self.draft if isinstance(self.draft, (list, tuple)) else [self.draft])]

    def options(self, target: LoadOptions) -> LoadOptions:
        """How a draft model is loaded: where nothing is said, like the target."""
        dtype, device = self.dtype or target.dtype, self.device or target.device
        return LoadOptions(dtype, device, None, target.trust_remote_code, target.runtime)

    def check(self, bundled: Path | None) -> None:
        """Raises RequestError for what can be seen before anything is loaded."""
        make_policy(self.policy)
        check_listed(self.drafts)
        check_profile(self.drafts, self.profile, force=self.force_profile)
        check_format(self.weight_format)
        check_place(
            self.drafts,
            bundled,
            draft_dtype=self.dtype,
            draft_device=self.device,
            draft_weight_format=self.weight_format,
        )


class Parts(NamedTuple):
    engine: Engine
    tokenizer: PreTrainedTokenizerBase | None


def _check_switches(**switches: object) -> None:
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise RequestError(f"{name}={value!r} is not usable; it must be True or False")


def assemble(
    target: str | Path | PreTrainedModel | None,
    options: LoadOptions,
    wishes: DraftWishes,
    room: Room,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    chat_template: str | Path | None,
    require_exact: bool,
) -> Parts:
    """Check, then load. Arguments and errors as for `LLM`."""
    remote, force = options.trust_remote_code, wishes.force_profile
    _check_switches(require_exact=require_exact, trust_remote_code=remote, force_profile=force)
    if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
        raise RequestError(f"tokenizer={tokenizer!r} is not usable; pass one of transformers, or None")
    template = None if chat_template is None else read_template(chat_template)
    if template is not None and tokenizer is not None:
        raise RequestError("chat_template contradicts tokenizer; set tokenizer.chat_template yourself instead")
    options = replace(options, max_model_len=room.max_model_len, cache_bytes=room.cache_bytes)
    bundled = bundled_draft(target)
    source = model_or_name(BUNDLED / "target" if target is None else target)
    if isinstance(source, PreTrainedModel):
        options.check_object(source)
    draft_options = wishes.options(options)
    wishes.check(bundled)
    model = load_target(source, options)
    check_exact(model, required=require_exact)
    if tokenizer is None and not isinstance(source, PreTrainedModel):
        tokenizer = find_tokenizer(source, options)
    if template is not None:
        if tokenizer is None:
            raise RequestError(
                "chat_template needs a tokenizer, and this model has none; set tokenizer.chat_template of your own"
            )
        tokenizer.chat_template = template
    length = room.context(model.max_positions)
    context = DraftContext(
        model,
        tokenizer,
        draft_options,
        wishes.profile,
        wishes.force_profile,
        weight_format=wishes.weight_format,
    )
    drafts = wishes.drafts
    drafter = automatic(context, bundled) if drafts == ["auto"] else make_drafters(drafts, context)
    model.cache.max_slots = room.max_batch_size
    model.cache.max_length = round_up(length, GRANULE)
    engine = Engine(
        model,
        drafter,
        make_policy(wishes.policy, several=isinstance(drafter, Several)),
        max_batch_size=room.max_batch_size,
        max_model_len=length,
        limits=CacheLimits.of(room.cache_bytes, room.prefix_cache, model.device),
    )
    if room.cache_bytes is not None:
        check_least(room.cache_bytes, sum(cache.need([SHORTEST]) for cache in engine.caches()))
    return Parts(engine, tokenizer)
