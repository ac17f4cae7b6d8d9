"""How a list of names, paths and models becomes drafters to choose among, and what is on the list of `auto`."""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from foredraft import profile
from foredraft.drafters.base import Drafter
from foredraft.drafters.make import DraftContext, DraftSpec, check_name, check_takes_profile, make_drafter, skips
from foredraft.drafters.model import ModelDrafter
from foredraft.drafters.registry import AUTO, DRAFTERS
from foredraft.drafters.self_draft import SelfDrafter, skip_set
from foredraft.drafters.several import Several, drafters_of
from foredraft.errors import ModelError, RequestError
from foredraft.models.base import CausalModel
from foredraft.models.options import LoadOptions
from foredraft.upstream.modules import unwrapped

WORTH_IT = 1.1  # speed-up that a profile must have measured


def automatic(context: DraftContext, bundled: Path | None = None) -> Drafter:
    """Lookup, and the draft model that came with the target, else the self-draft that its profile recommends.

    `bundled` is the folder of that draft model.
    """
    specs: list[DraftSpec] = [AUTO]
    reasons = ["costs next to nothing"]
    measured = None if bundled else _measured(context.target)
    if bundled is not None:
        specs.append(bundled)
        reasons.append("came with this target")
    if measured is not None:
        name, speedup = measured
        specs.append(name)
        reasons.append(f"{speedup:.2f} times as fast as plain decoding, says this model's profile")
    return make_drafters(specs, context, reasons)


def _measured(target: CausalModel) -> tuple[str, float] | None:
    """The self-draft that this model's profile says pays, and how much faster it made the model."""
    try:
        found = profile.find(target)
    except ModelError:  # whoever asks for a self-draft will hear what is wrong with it
        return None
    speedups = {name: it.speedup for name, it in found.measured.items() if name in DRAFTERS} if found else {}
    best = max(speedups, key=speedups.__getitem__, default="")
    return (best, speedups[best]) if best and speedups[best] >= WORTH_IT else None


def make_drafters(specs: Sequence[DraftSpec], context: DraftContext, reasons: Sequence[str] = ()) -> Drafter:
    """The one that is listed, or several to choose among.

    Raises:
        ModelError, VocabularyMismatchError: as `make_drafter`; a profile is missing, or of no use to any.
        RequestError: as `make_drafter`; the list is empty, names something twice, or something that cannot be chosen.
    """
    specs = [unwrapped(spec) for spec in specs]
    check_listed(specs)
    if len(specs) == 1:
        return make_drafter(specs[0], context)
    listed = _listed(specs)
    _check_profiles(specs, context, listed)
    unprofiled = replace(context, profile=None, force_profile=False)
    drafters = [make_drafter(spec, context if skips(spec) else unprofiled) for spec in specs]
    return Several(_told_apart(drafters, listed), reasons)


def _listed(specs: Sequence[DraftSpec]) -> str:
    return f"draft=[{', '.join(map(_word, specs))}]"


def check_listed(specs: Sequence[DraftSpec]) -> None:
    """Raises RequestError as `make_drafters` does, before anything is loaded."""
    listed = _listed(specs)
    if len(specs) == 1:
        return check_name(specs[0])
    if not specs:
        raise RequestError("draft=[] names no drafter; use draft='none' for plain decoding")
    seen: list[object] = []
    for spec in specs:
        check_name(spec)
        if spec is None or spec == "none":
            raise RequestError(f"{listed}: leave {_word(spec)} out; plain decoding is always among the choices")
        if spec == "auto":
            raise RequestError(f"{listed}: 'auto' makes a list itself; give it alone, or name the drafters")
        if isinstance(spec, Several):
            raise RequestError(f"{listed}: a list cannot hold another; name the drafters in one")
        known = str(Path(spec).expanduser()) if isinstance(spec, (str, Path)) else spec
        if any(known is other or (isinstance(known, str) and known == other) for other in seen):
            raise RequestError(f"{listed} names {_word(spec)} twice; name each drafter once")
        seen.append(known)


def _check_profiles(specs: Sequence[DraftSpec], context: DraftContext, listed: str) -> None:
    """Before anything is loaded: whether each has the profile that it needs, and whether any needs the one given."""
    check_profile(specs, context.profile, force=context.force_profile)
    skipping = [spec for spec in specs if skips(spec)]
    if not skipping:
        return
    try:
        skip_set(context.target, context.profile, force=context.force_profile)
    except ModelError as error:
        raise type(error)(f"{listed}, {_word(skipping[0])}: {error}; or leave it out of the list") from error


def check_profile(specs: Sequence[DraftSpec], path: str | Path | None, *, force: bool = False) -> None:
    """Before anything is loaded: whether a profile that is given can be read, and any of these needs one.

    Raises:
        ModelError: it cannot, or none does.
    """
    if path is not None or force:
        check_takes_profile(specs, _listed(specs) if len(specs) > 1 else f"draft={specs[0]!r}")
    if path is not None:
        profile.load(path)


def _told_apart(drafters: list[Drafter], listed: str) -> list[Drafter]:
    """Draft models are numbered; whoever brings a drafter of his own names it himself."""
    names: set[str] = set()
    models = 0
    for drafter in drafters:
        if isinstance(drafter, ModelDrafter) and not isinstance(drafter, SelfDrafter):
            models += 1
            drafter.name = "model" if models == 1 else f"model-{models}"
        if drafter.name in names:
            raise RequestError(f"{listed}: two drafters are called {drafter.name!r}; give one of them another name")
        names.add(drafter.name)
    return drafters


def _word(spec: DraftSpec) -> str:
    return repr(str(spec)) if isinstance(spec, (str, Path)) else getattr(spec, "name", None) or type(spec).__name__


def check_place(drafts: Sequence[DraftSpec], bundled: Path | None, **place: str | torch.dtype | None) -> None:
    """Raises RequestError where one of these is given and says nothing to any of the drafters."""
    given = " and ".join(f"{name}={value!r}" for name, value in place.items() if value is not None)
    for draft in drafts:
        if isinstance(draft, PreTrainedModel):
            LoadOptions(place.get("draft_dtype") or "auto", str(place.get("draft_device") or "auto")).check_object(
                draft, "draft_"
            )
    if not given or any(_loads(draft, bundled) for draft in drafts):
        return
    why = " and ".join(f"draft={draft!r} {_instead(draft)}" for draft in drafts)
    raise RequestError(f"{why}, so {given} cannot be honoured; leave it out")


def _instead(draft: object) -> str:
    """What a drafter has where others have a model to load."""
    kind = DRAFTERS.get(str(draft))
    own = isinstance(draft, SelfDrafter) or (kind is not None and kind.own_weights)
    return "drafts with the target's own weights" if own else "has no model to load"


def _loads(draft: object, bundled: Path | None) -> bool:
    if draft == "auto":
        return bundled is not None
    return isinstance(draft, (Path, PreTrainedModel)) or (isinstance(draft, str) and draft not in DRAFTERS)


def check_asked(drafter: Drafter, name: str | None, num_draft_tokens: int | None) -> None:
    """Raises RequestError where a request names a drafter that is not there, or wants drafts and none."""
    if name in (None, "none") and num_draft_tokens:
        raise RequestError(f"draft={name!r} contradicts num_draft_tokens={num_draft_tokens}; drop one of them")
    names = [it.name for it in drafters_of(drafter)]
    if name in (None, "none", "auto", *names):
        return
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(names)}, or name it in LLM(draft=[...])"
    raise RequestError(f"draft={name!r} is not among this LLM's drafters; {hint}")
