"""What flags say about the scores of tokens: biases, and logits processors of the user's own, found by name."""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from foredraft.errors import RequestError

if TYPE_CHECKING:
    from foredraft.steering import Processor, Stateful


def read_biases(given: Sequence[str]) -> dict[int, float]:
    """From `ID=VALUE`, such as 42=-inf. Raises RequestError where one is something else."""
    found: dict[int, float] = {}
    for text in given:
        token, _, value = text.partition("=")
        try:
            found[int(token)] = float(value)
        except ValueError as error:
            raise RequestError(f"--logit-bias {text!r} is not usable; give ID=VALUE, such as 42=-1.5") from error
    return found


def load_processors(given: Sequence[str]) -> "tuple[Processor | Stateful, ...]":
    """
    Raises:
        RequestError: a file or module cannot be run, or has nothing of this name that processes scores.
    """
    return tuple(map(_processor, given))


def _processor(spec: str) -> "Processor | Stateful":
    """A class is made afresh for each request where it has `copy`, and made once where it has none."""
    from foredraft.steering import Stateful

    where, _, name = spec.rpartition(":")
    if not where or not name.isidentifier():
        raise RequestError(f"--processor {spec!r} is not usable; give FILE.py:NAME or MODULE:NAME")
    module = _module(spec, where)
    if not hasattr(module, name):
        raise RequestError(f"--processor {spec!r}: there is no {name} in {where}; name what it defines")
    found: Any = getattr(module, name)
    if isinstance(found, type):
        found = Stateful(found) if hasattr(found, "copy") else _made(spec, found)
    if not (isinstance(found, Stateful) or callable(found)):
        raise RequestError(
            f"--processor {spec!r}: {name} is {found!r}; name a LogitsProcessor, its class, or a Stateful"
        )
    processor: Processor | Stateful = found
    return processor


def _module(spec: str, where: str) -> ModuleType:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        described = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert described is not None and described.loader is not None
        module = importlib.util.module_from_spec(described)
        described.loader.exec_module(module)
        return module
    except Exception as error:  # of the user's own code
        raise RequestError(f"--processor {spec!r} cannot be loaded: {type(error).__name__}: {error}") from error


def _made(spec: str, kind: type) -> object:
    try:
        return kind()
    except Exception as error:  # of the user's own code
        raise RequestError(
            f"--processor {spec!r}: {kind.__name__}() fails ({error}); name an object instead of its class"
        ) from error
