"""Programs of benchmarks/, imported as they are from their own folders."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def imported(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path = BENCHMARKS) -> Iterator[ModuleType]:
    """A module, forgotten afterwards with those of benchmarks/ that it imported."""
    for place in (BENCHMARKS, folder):
        monkeypatch.syspath_prepend(str(place))
    before = set(sys.modules)
    yield import_module(name)
    for other in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[other], "__file__", "")):
            del sys.modules[other]
