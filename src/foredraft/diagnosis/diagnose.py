"""Everything a bug report needs, in one object. What fails on the way is part of it, so that a broken installation is
described as far as it goes. Holds no name of a machine or a user.
"""

import platform
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from foredraft.diagnosis import machine
from foredraft.diagnosis.machine import Machine
from foredraft.errors import RequestError
from foredraft.versions import TESTED, installed

if TYPE_CHECKING:
    from foredraft.diagnosis.promises import Promise
    from foredraft.diagnosis.serving import Serving, Torch

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Version:
    package: str
    installed: str | None
    tested: str = ""  # the range of minor releases, where there is one
    complaint: str | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that raised: while doing what, which error, and where in foredraft."""

    doing: str
    error: str
    where: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    versions: tuple[Version, ...]
    machine: Machine
    torch: "Torch | None"
    serving: "Serving | None"
    promises: "tuple[Promise, ...]"
    failure: Failure | None

    @property
    def well(self) -> bool:
        """Nothing failed, and no promise is broken. What is unclear, or of an untested version, may still be well."""
        return self.failure is None and all(promise.state != "broken" for promise in self.promises)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"well": self.well}


def diagnose(model: str | None = None, draft: str = "auto", **options: Any) -> Diagnosis:
    """Look at this machine and load a model on it; `options` are those of LLM.

    Raises:
        RequestError: an option is not usable. Every other failure is in the diagnosis.
    """
    tried = _Attempts()
    torch = tried.go("importing torch and transformers", _torch)
    loaded = torch and tried.go(f"loading the model, draft {draft!r}", lambda: _load(model, draft, options))
    promises = loaded and tried.go("decoding a text", lambda: _check(loaded[0]))
    serving = loaded[1] if loaded else None
    return Diagnosis(versions(), machine.look(), torch, serving, tuple(promises or ()), tried.failure)


def versions() -> tuple[Version, ...]:
    """foredraft, Python, and what it stands on."""
    tested = {entry.package: entry for entry in TESTED}
    found = [Version("foredraft", installed("foredraft")), Version("python", platform.python_version())]
    for package in PACKAGES:
        present, known = installed(package), tested.get(package)
        found.append(
            Version(package, present, f"{known.first} to {known.last}", known.complaint(present))
            if known
            else Version(package, present)
        )
    return tuple(found)


class _Attempts:
    """Runs one thing after another, and keeps the first failure."""

    def __init__(self) -> None:
        self.failure: Failure | None = None

    def go(self, doing: str, work: Callable[[], Found]) -> Found | None:
        try:
            return work()
        except RequestError:
            raise
        except Exception as error:  # whatever it is, it is what somebody wants to report
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.failure = Failure(doing, without_home(text), _where(error))
            return None


def without_home(text: str) -> str:
    """A home folder's path names its user."""
    return text.replace(str(Path.home()), "~") if str(Path.home()) != "/" else text


def _where(error: Exception) -> str:
    """The innermost line of ours that the error passed."""
    root = Path(__file__).parents[1]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(root)]
    ours = [f for f in frames if Path(f.filename) != Path(__file__)] or frames
    return f"foredraft/{Path(ours[-1].filename).relative_to(root).as_posix()}:{ours[-1].lineno}"


def _torch() -> "Torch":
    from foredraft.diagnosis import serving

    return serving.look()


def _load(model: str | None, draft: str, options: dict[str, Any]) -> "tuple[Any, Serving]":
    from foredraft.diagnosis import serving

    return serving.load(model, draft, **options)


def _check(llm: Any) -> "list[Promise]":
    from foredraft.diagnosis import promises

    return promises.check(llm)
