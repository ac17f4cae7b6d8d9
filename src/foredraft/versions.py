"""Which versions of torch and transformers foredraft was tested with, and what to say about any other.

The one place that names them. Reads what is installed without importing it, so that this works where they do not.
"""

import functools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from foredraft.errors import ForedraftError, ModelError


class UntestedVersionWarning(UserWarning):
    """torch or transformers is of a version that foredraft was not tested with."""


@dataclass(frozen=True, slots=True)
class VersionRange:
    """The first and last minor release of a package that we declare; docs/install.md says which of them were run."""

    package: str
    first: str
    last: str

    def complaint(self, installed: str | None) -> str | None:
        """What is wrong with a version, if anything. None counts as tested: nothing is known of it."""
        if installed is None or _minor(self.first) <= _minor(installed) <= _minor(self.last):
            return None
        if not _minor(installed):
            return f"{self.package} {installed!r} has no number; foredraft was tested with {self.first} to {self.last}"
        side = "newer" if _minor(installed) > _minor(self.last) else "older"
        return f"{self.package} {installed} is {side} than what foredraft was tested with, {self.first} to {self.last}"


TESTED = (VersionRange("torch", "2.11", "2.15"), VersionRange("transformers", "5.17", "5.24"))


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def complaints() -> list[str]:
    """A sentence for each package that is of an untested version."""
    found = (tested.complaint(installed(tested.package)) for tested in TESTED)
    return [text for text in found if text]


@functools.cache  # once a process
def warn_if_untested() -> None:
    for complaint in complaints():
        text = f"{complaint}; if something fails, install a tested version, and please report it"
        warnings.warn(text, UntestedVersionWarning, stacklevel=2)


@contextmanager
def suspected() -> Iterator[None]:
    """Errors of loading a model name untested versions too: then they are the likeliest reason."""
    try:
        yield
    except (ModelError, AttributeError, TypeError, KeyError, NotImplementedError) as error:
        doubt = "; ".join(complaints())
        if not doubt:
            raise
        kind = type(error) if isinstance(error, ForedraftError) else ModelError
        raise kind(f"{error} ({doubt}: this may be the reason)") from error


def _minor(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release)[:2])
