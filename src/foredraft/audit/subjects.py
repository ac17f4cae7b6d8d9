"""Who is audited: the drafters that the user names, or all that can be had for this model without being prepared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foredraft import profile
from foredraft.drafters.base import Drafter
from foredraft.drafters.listed import automatic, check_place, make_drafters
from foredraft.drafters.make import DraftContext, DraftSpec, check_format
from foredraft.drafters.registry import DRAFTERS, split
from foredraft.drafters.several import drafters_of
from foredraft.errors import ModelError, RequestError
from foredraft.llm import BUNDLED, LLM
from foredraft.models.load import LoadOptions


@dataclass(frozen=True, slots=True)
class Audited:
    """A drafter, by the name that the report gives it and by what the command line calls it."""

    name: str
    flag: str
    drafter: Drafter


def find(
    llm: LLM, drafts: Sequence[str], load: LoadOptions, *, bundled: bool, weight_format: str | None = None
) -> tuple[list[Audited], dict[str, str]]:
    """The drafters, and why others cannot draft for this model. With no names: all of them, and `auto`.

    `bundled` says that the target is the bundled one, which has a draft model; `weight_format` is of draft models.

    Raises:
        RequestError, ModelError: a drafter that was named cannot draft for this model.
    """
    context = DraftContext(llm.model, llm._tokenizer, load, weight_format=weight_format)
    draft = BUNDLED / "draft" if bundled else None
    if drafts:
        _check(drafts)
        return [Audited(_short(name), name, _make(name, context, draft)) for name in drafts], {}
    found, left_out = [], {}
    for name in [*(it for it in DRAFTERS if it != "none"), *(["model"] if draft else []), "auto"]:
        try:
            found.append(Audited(name, name, _make(name, context, draft)))
        except ModelError as error:
            left_out[name] = str(error)
    return found, left_out


def check_bits(drafts: Sequence[str], weight_format: str | None, bundled: Path | None) -> None:
    """Raises RequestError where draft models cannot have their weights so, or there are none."""
    check_format(weight_format)
    specs = [it for name in drafts or ["auto"] for it in _split(name)]
    check_place(specs, bundled, draft_weight_format=weight_format)


def _check(drafts: Sequence[str]) -> None:
    if "none" in drafts:
        raise RequestError("draft='none' drafts nothing, so there is nothing to audit; name drafters, or none at all")
    twice = [name for i, name in enumerate(drafts) if name in drafts[:i]]
    if twice:
        raise RequestError(f"draft names {twice[0]!r} twice; name each drafter once")


def _make(name: str, context: DraftContext, bundled: Path | None) -> Drafter:
    if name == "auto":
        return automatic(context, bundled)
    specs: list[DraftSpec] = [bundled if it == "model" and bundled else it for it in _split(name)]
    return make_drafters(specs, context)


def _short(name: str) -> str:
    """Without the folders that paths name."""
    return ",".join(Path(it).name if Path(it).exists() else it for it in _split(name))


def _split(name: str) -> list[str]:
    """The drafters of a list."""
    found = split(name)
    return [found] if isinstance(found, str) else found


def fingerprint(llm: LLM, drafter: Drafter) -> str:
    """Of the draft models' weights; empty where none has any of its own."""
    models = (getattr(it, "model", None) for it in drafters_of(drafter))
    own = [model for model in models if model is not None and model.cache is not llm.model.cache]
    return "+".join(map(profile.model_hash, own))
