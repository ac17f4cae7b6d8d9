"""How a name, a path or a model becomes a drafter."""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foredraft.drafters.base import Drafter, NoDrafter
from foredraft.drafters.model import ModelDrafter
from foredraft.drafters.registry import DRAFTERS, split, with_profile
from foredraft.drafters.translated import TranslatingDrafter
from foredraft.drafters.vocabulary import Translation, first_difference
from foredraft.errors import ModelError, RequestError, VocabularyMismatchError
from foredraft.models.base import CausalModel
from foredraft.models.load import LoadOptions, load_model
from foredraft.models.pretrained import load_tokenizer
from foredraft.upstream.modules import unwrapped
from foredraft.weights.checkpoint import looks_like_path
from foredraft.weights.lowbit import is_low_bit
from foredraft.weights.quantize import ForDrafting, Quantizer, WeightFormat


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a drafter may be built from."""

    target: CausalModel
    tokenizer: PreTrainedTokenizerBase | None
    options: LoadOptions  # of the drafter
    profile: str | Path | None = None  # which sub-layers a self-drafter skips; None: as kept for this model
    force_profile: bool = False  # take a profile that was found for another model
    remember: bool = True  # may it draft from outputs of earlier requests?
    weight_format: str | None = None  # of a draft model: none (as it is), int8, int4; None: the best for its size


DraftSpec = str | Path | PreTrainedModel | Drafter | None
DRAFT_FORMATS: dict[str, WeightFormat] = {"int8": "int8-dynamic", "int4": "int4"}
HEAVY = 0.1  # of the target's weights; from there on four bits save more time than their worse guesses cost


def make_drafter(spec: DraftSpec, context: DraftContext) -> Drafter:
    """A drafter by name, or from a draft model's folder, hub name or object, or as it is.

    Raises:
        ModelError: no model is there.
        RequestError: nothing of that name; the nearest known name is suggested.
        VocabularyMismatchError: the draft model has other tokens, which cannot be translated.
    """
    if context.profile is not None or context.force_profile:
        check_takes_profile([spec], f"draft={spec!r}")
    spec = unwrapped(spec)
    if spec is None:
        return NoDrafter()
    if isinstance(spec, str) and spec in DRAFTERS:
        return DRAFTERS[spec].make(context)
    if isinstance(spec, (str, Path)):
        return _from_checkpoint(spec, context)
    if isinstance(spec, PreTrainedModel):
        return _from_object(spec, context)
    if not isinstance(spec, Drafter):
        names = ", ".join(DRAFTERS)
        raise ModelError(
            f"draft={spec!r} cannot draft; give a name ({names}), a model's folder or hub name, or a Drafter"
        )
    _check_made(spec, context.target.vocab_size)
    return spec


def skips(spec: DraftSpec) -> bool:
    """Whether this is a drafter that leaves out what a profile says."""
    return isinstance(spec, str) and spec in with_profile()


def check_takes_profile(specs: Sequence[DraftSpec], listed: str) -> None:
    """Raises ModelError where none of these, which the error calls `listed`, takes a profile."""
    if not any(map(skips, specs)):
        raise ModelError(f"{listed} takes no profile; drop it, or use one of {', '.join(with_profile())}")


def _check_made(drafter: Drafter, vocab_size: int) -> None:
    """Raises VocabularyMismatchError where a drafter, or the memory it drafts from, says that it has other tokens."""
    for owner in (drafter, getattr(drafter, "memory", None)):
        size = getattr(owner, "vocab_size", vocab_size)
        if size != vocab_size:
            raise VocabularyMismatchError(
                f"{type(owner).__name__}(vocab_size={size}) cannot draft for a target of {vocab_size} tokens; make one "
                f"with vocab_size={vocab_size}"
            )


def check_format(name: str | None) -> None:
    """Raises RequestError where a draft model cannot have its weights so."""
    if name not in (None, "none", *DRAFT_FORMATS):
        raise RequestError(f"draft_weight_format={name!r} is not known; use none, {', '.join(DRAFT_FORMATS)}")


def check_name(spec: DraftSpec) -> None:
    """Raises RequestError where this looks like a drafter's name misspelt, rather than like a model."""
    if isinstance(spec, str) and spec not in DRAFTERS and not looks_like_path(spec) and "/" not in spec:
        names = split(spec)
        if not isinstance(names, str) and all(name in DRAFTERS for name in names):
            raise RequestError(f"draft={spec!r} is several; give a list: draft={names!r}")
        if spec == "model":
            raise RequestError("draft='model' is what results call a draft model; give its folder or hub name")
        near = difflib.get_close_matches(spec, DRAFTERS, n=1)
        if near:
            raise RequestError(f"draft={spec!r} is not known; did you mean {near[0]!r}?")


def _from_checkpoint(source: str | Path, context: DraftContext) -> Drafter:
    check_name(source)
    if context.weight_format in DRAFT_FORMATS and is_low_bit(source):
        raise RequestError(
            f"draft_weight_format={context.weight_format!r} cannot be honoured: {source} is in few bits already; "
            "leave it out"
        )
    try:
        model = load_model(source, context.options)
    except ModelError as error:
        names = ", ".join(("auto", *DRAFTERS))
        raise type(error)(f"draft={str(source)!r}: {error} (drafters by name: {names})") from error
    if context.tokenizer is None:
        _check_size(model.vocab_size, context, "the target came without a tokenizer to compare; pass tokenizer=...")
        return _drafting_with(model, context)
    tokenizer = load_tokenizer(source, context.options)
    difference = first_difference(context.tokenizer, tokenizer)
    return _drafting_with(model, context) if difference is None else _translating(model, tokenizer, context, difference)


def _translating(
    model: CausalModel, tokenizer: PreTrainedTokenizerBase, context: DraftContext, difference: str
) -> Drafter:
    target = context.target
    assert context.tokenizer is not None
    try:
        by = Translation(context.tokenizer, target.vocab_size, tokenizer, model.vocab_size)
    except VocabularyMismatchError as error:
        raise VocabularyMismatchError(
            f"{difference}, and drafts cannot be translated: {error}; use a draft with the target's tokenizer"
        ) from error
    logging.getLogger("foredraft").warning(
        "the draft model has another vocabulary, so drafts are translated by way of text: %s", by.overlap
    )
    return TranslatingDrafter(_for_drafting(model, context), by)


def _from_object(model: PreTrainedModel, context: DraftContext) -> Drafter:
    size = model.config.get_text_config(decoder=True).vocab_size
    _check_size(
        size, context, "an object comes without a tokenizer to compare; give the draft by its folder or hub name"
    )
    return _drafting_with(load_model(model, context.options), context)


def _check_size(size: int, context: DraftContext, advice: str) -> None:
    """All that can be compared of two vocabularies where a tokenizer is missing."""
    wanted = context.target.vocab_size
    if size != wanted:
        raise VocabularyMismatchError(f"the draft model has {size} tokens and the target {wanted}, and {advice}")


def _drafting_with(model: CausalModel, context: DraftContext) -> Drafter:
    return ModelDrafter(_for_drafting(model, context), context.target.vocab_size)


def _for_drafting(model: CausalModel, context: DraftContext) -> CausalModel:
    """A draft model in fewer bits: its guesses change no text, and in eight bits they are hardly worse."""
    asked = context.weight_format
    if asked is None:
        heavy = model.weight_bytes > HEAVY * context.target.weight_bytes
        return model.variant(ForDrafting("int4" if heavy else "int8"))
    return model if asked == "none" else model.variant(Quantizer(DRAFT_FORMATS[asked]))
