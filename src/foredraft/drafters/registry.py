"""The drafters that have a name: one record each, read by the library, the command line, tuning and the docs.

A new drafter is a file beside this one and a record here. What a record makes is imported only when it is made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foredraft.drafters.base import Drafter
    from foredraft.drafters.make import DraftContext
    from foredraft.weights.quantize import WeightFormat


@dataclass(frozen=True, slots=True)
class DrafterKind:
    """What is known of a drafter before it is made."""

    name: str
    help: str  # for tables: what it drafts with
    make: "Callable[[DraftContext], Drafter]"
    own_weights: bool = False  # a self-draft: the target's own weights, in its cache
    weight_format: "WeightFormat | None" = None  # of a self-draft; None: as the target has them
    needs_profile: bool = False  # of which sub-layers it leaves out


def _none(context: "DraftContext") -> "Drafter":
    from foredraft.drafters.base import NoDrafter

    return NoDrafter()


def _ngram(context: "DraftContext") -> "Drafter":
    from foredraft.drafters.ngram import NgramDrafter

    return NgramDrafter()


def _suffix(context: "DraftContext") -> "Drafter":
    from foredraft.drafters.memory import SuffixMemory
    from foredraft.drafters.suffix import SuffixDrafter

    return SuffixDrafter(SuffixMemory(context.target.vocab_size) if context.remember else None)


def _self_draft(name: str, help: str, weights: "WeightFormat | None", *, skips: bool = False) -> DrafterKind:
    def make(context: "DraftContext") -> "Drafter":
        from foredraft.drafters.self_draft import SelfDrafter, skip_set
        from foredraft.models.base import NO_SKIP

        skip = skip_set(context.target, context.profile, force=context.force_profile) if skips else NO_SKIP
        return SelfDrafter(context.target, name, weights, skip)

    return DrafterKind(name, help, make, True, weights, skips)


KINDS = (
    DrafterKind("none", "nothing: plain decoding", _none),
    DrafterKind("ngram", "what followed the longest suffix of the text that occurred before in it", _ngram),
    DrafterKind("suffix", "what most often followed the end of the text, in it or in earlier outputs", _suffix),
    _self_draft("int4", "the target's own weights in four bits", "int4"),
    _self_draft("int8", "the target's own weights in eight bits", "int8-dynamic"),
    _self_draft("skip", "the target without some of its sub-layers", None, skips=True),
    _self_draft("int4+skip", "the target in four bits and without some of its sub-layers", "int4", skips=True),
)
DRAFTERS = {kind.name: kind for kind in KINDS}
AUTO = "suffix"  # what `auto` has whatever the target


def split(text: str) -> str | list[str]:
    """What a flag names: one drafter, or several with commas between."""
    names = [name.strip() for name in text.split(",")]
    return text if len(names) == 1 or Path(text).exists() else names


def with_profile() -> list[str]:
    """Names of those that need a profile."""
    return [kind.name for kind in KINDS if kind.needs_profile]


def drafting() -> list[str]:
    """Names of those that draft at all."""
    return [kind.name for kind in KINDS if kind.name != "none"]
