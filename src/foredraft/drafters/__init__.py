"""Everything that guesses tokens ahead: a file each, a record each in the registry, and how a name becomes one.

Importing the package imports neither torch nor transformers, so that the command line's help may list the drafters.
"""

from typing import TYPE_CHECKING, Any

from foredraft.drafters.registry import DRAFTERS, DrafterKind

if TYPE_CHECKING:
    from foredraft.drafters.make import DraftContext, make_drafter

__all__ = ["DRAFTERS", "DraftContext", "DrafterKind", "make_drafter"]


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'foredraft.drafters' has no attribute {name!r}")
    from foredraft.drafters import make

    return getattr(make, name)
