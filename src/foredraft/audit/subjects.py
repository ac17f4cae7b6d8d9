"""Who is audited: the drafters that the user names, or all that can be had for this model without being prepared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foredraft import profile
from foredraft.drafters.base import Drafter
from foredraft.drafters.listed import automatic, make_drafters
from foredraft.drafters.make import DraftContext, DraftSpec
from foredraft.drafters.registry import DRAFTERS
from foredraft.errors import ModelError, RequestError
from foredraft.llm import BUNDLED, LLM
from foredraft.models.load import LoadOptions


@dataclass(frozen=True, slots=True)
class Audited:
    """A drafter, by the name that the report gives it and by what the command line calls it."""

    name: str
    flag: str
    drafter: Drafter


def find(llm: LLM, drafts: Sequence[str], load: LoadOptions, *, bundled: bool) -> tuple[list[Audited], dict[str, str]]:
    """The drafters, and why others cannot draft for this model. With no names: all of them, and `auto`.

    `bundled` says that the target is the bundled one, which has a draft model.

    Raises:
        RequestError, ModelError: a drafter that was named cannot draft for this model.
    """
    context = DraftContext(llm.model, llm._tokenizer, load)
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


def _check(drafts: Sequence[str]) -> None:
    if "none" in drafts:
        raise RequestError("draft='none' drafts nothing, so there is nothing to audit; name drafters, or none at all")
    twice = [name for i, name in enumerate(drafts) if name in drafts[:i]]
    if twice:
        raise RequestError(f"draft names {twice[0]!r} twice; name each drafter once")


def _make(name: str, context: DraftContext, bundled: Path | None) -> Drafter:
    if name == "auto":
        return automatic(context, bundled)
    specs: list[DraftSpec] = [bundled if name == "model" and bundled else name]
    return make_drafters(specs, context)


def _short(name: str) -> str:
    """Without the folders that a path names."""
    return Path(name).name if Path(name).exists() else name


def fingerprint(llm: LLM, drafter: Drafter) -> str:
    """Of the draft model's weights; empty where a drafter has none of its own."""
    model = getattr(drafter, "model", None)
    if model is None or model.cache is llm.model.cache:
        return ""
    return profile.model_hash(model)
