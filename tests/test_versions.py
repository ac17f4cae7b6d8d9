"""Versions: one place names what was tested; the declared ranges and the pinned versions agree with it; others are
named, once, and never taken for something else."""

import importlib
import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import foredraft.models
from foredraft import versions
from foredraft.errors import ModelError, RequestError, UnsupportedModelError
from foredraft.versions import TESTED, UntestedVersionWarning, VersionRange, suspected, warn_if_untested

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = ("serve", "tune", "bench", "dev")


def requirements(*extras: str) -> list[Requirement]:
    lines = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        lines += PROJECT["project"]["optional-dependencies"][extra]
    return [found for found in map(Requirement, lines) if found.name != "foredraft"]


@pytest.fixture
def install() -> ModuleType:
    """scripts/install.py, as a module."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts" / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The day after a release of transformers."""
    monkeypatch.setattr(versions, "installed", {"torch": "2.13.0+cpu", "transformers": "5.99.0"}.get)
    warn_if_untested.cache_clear()


# --- what was tested ---


@pytest.mark.parametrize("version", ["5.17", "5.17.0", "5.24.9", "5.20.0.dev0", None])
def test_a_tested_version_has_no_complaint(version: str | None) -> None:
    assert VersionRange("transformers", "5.17", "5.24").complaint(version) is None


@pytest.mark.parametrize(("version", "side"), [("5.25.0", "newer"), ("6.0.0rc1", "newer"), ("5.9.0", "older")])
def test_another_version_is_named_beside_the_tested_ones(version: str, side: str) -> None:
    """5.9 is older than 5.17: versions are numbers, not text."""
    complaint = VersionRange("transformers", "5.17", "5.24").complaint(version)
    assert complaint == f"transformers {version} is {side} than what foredraft was tested with, 5.17 to 5.24"


def test_a_build_of_torch_is_its_version() -> None:
    assert VersionRange("torch", "2.11", "2.15").complaint("2.15.0+cu130") is None


def test_what_is_installed_here_was_tested() -> None:
    """Fails on the day a release is taken in that `TESTED` does not know yet."""
    if versions.complaints():
        pytest.skip("; ".join(versions.complaints()))
    assert all(versions.installed(tested.package) for tested in TESTED)


# --- the ranges and the pins say the same ---


@pytest.mark.parametrize("tested", TESTED, ids=lambda tested: tested.package)
def test_the_declared_range_is_the_tested_one(tested: VersionRange) -> None:
    (declared,) = (r for r in requirements() if r.name == tested.package)
    assert Version(tested.first) in declared.specifier and Version(tested.last) in declared.specifier
    lowest = min(Version(s.version) for s in declared.specifier if s.operator == ">=")
    assert lowest == Version(tested.first)


def test_torch_is_declared_no_further_than_tested() -> None:
    """Its operators are not all public; transformers' next minor release is let in, with a warning."""
    (declared,) = (r for r in requirements() if r.name == "torch")
    (last,) = (Version(tested.last) for tested in TESTED if tested.package == "torch")
    assert Version(f"{last.major}.{last.minor + 1}") not in declared.specifier


@pytest.mark.parametrize("needed", requirements(*EXTRAS), ids=str)
def test_every_dependency_is_pinned_inside_its_range(needed: Requirement, install: ModuleType) -> None:
    pinned = {name.lower().replace("_", "-"): version for name, version in install.pinned().items()}
    assert needed.name.lower() in pinned, f"run `make constraints`: {needed.name} is not in constraints.txt"
    assert Version(pinned[needed.name.lower()]) in needed.specifier


def test_the_build_is_pinned_too(install: ModuleType) -> None:
    for needed in map(Requirement, PROJECT["build-system"]["requires"]):
        assert Version(install.pinned()[needed.name]) in needed.specifier


@pytest.mark.parametrize("tested", TESTED, ids=lambda tested: tested.package)
def test_the_pinned_version_is_a_tested_one(tested: VersionRange, install: ModuleType) -> None:
    assert tested.complaint(install.pinned()[tested.package]) is None


# --- loud, once, and no wrong reason ---


@pytest.mark.usefixtures("newer")
def test_an_untested_version_warns_when_models_are_imported_and_only_once() -> None:
    with pytest.warns(UntestedVersionWarning, match=r"transformers 5\.99\.0 is newer .* 5\.17 to 5\.24") as caught:
        importlib.reload(foredraft.models)
        importlib.reload(foredraft.models)
    assert len(caught) == 1


@pytest.mark.usefixtures("newer")
@pytest.mark.parametrize("error", [UnsupportedModelError("'llama' cannot serve"), AttributeError("no 'layers'")])
def test_what_fails_to_load_names_the_untested_version(error: Exception) -> None:
    """transformers 5.24 renamed an argument, and we said that llama takes no cache."""
    with pytest.raises(ModelError, match=r"transformers 5\.99\.0 is newer.*may be the reason") as caught, suspected():
        raise error
    assert str(error) in str(caught.value)
    assert isinstance(caught.value, type(error)) or type(caught.value) is ModelError


@pytest.mark.usefixtures("newer")
def test_a_wrong_request_is_not_blamed_on_a_version() -> None:
    with pytest.raises(RequestError, match=r"^dtype$"), suspected():
        raise RequestError("dtype")


def test_with_tested_versions_an_error_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", {"torch": "2.13.0", "transformers": "5.24.0"}.get)
    with pytest.raises(AttributeError, match=r"^no 'layers'$"), suspected():
        raise AttributeError("no 'layers'")


# --- which torch is installed ---


def shelf(install: ModuleType, monkeypatch: pytest.MonkeyPatch, pip: list[str], index: list[str]) -> None:
    monkeypatch.setattr(install, "offered", lambda place: index if place else pip)


def test_a_cpu_build_is_taken_where_pip_looks(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    releases = ["2.15.0", "2.9.1+cpu", "2.13.0+cpu", "2.12.1+cpu", "2.13.0", "2.16.0+cpu"]
    shelf(install, monkeypatch, releases, ["2.15.0+cpu"])
    assert install.cpu_torch(install.wanted("latest"), newest=True) == ["torch==2.13.0+cpu"]
    assert install.cpu_torch(install.wanted("lowest"), newest=False) == ["torch==2.12.1+cpu"]


def test_pytorchs_own_index_is_asked_where_pip_has_none(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf(install, monkeypatch, ["2.15.0", "2.13.0"], ["2.15.0+cpu", "2.11.0+cpu"])
    assert install.cpu_torch(install.wanted("latest"), newest=True) == [*install.CPU_INDEX, "torch==2.15.0+cpu"]
    assert install.cpu_torch(install.wanted("lowest"), newest=False) == [*install.CPU_INDEX, "torch==2.11.0+cpu"]


def test_without_a_cpu_build_it_is_left_to_pip(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf(install, monkeypatch, ["2.15.0", "2.13.0"], [])
    assert install.cpu_torch(install.wanted("pinned"), newest=True) == []


def test_the_pinned_torch_is_pinned(install: ModuleType) -> None:
    allowed = install.wanted("pinned")
    exact = install.pinned()["torch"]
    assert allowed(f"{exact}+cpu") and allowed(exact) and not allowed("2.11.0+cpu")


def test_lowest_asks_for_the_lower_bounds(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "installed_torch", lambda: "")
    assert {"torch==2.11", "transformers==5.17"} <= set(install.rules("lowest"))
    monkeypatch.setattr(install, "installed_torch", lambda: "2.13.0+cpu")
    assert "torch==2.13.0+cpu" in install.rules("lowest") and "torch==2.11" not in install.rules("lowest")


def test_the_scripts_need_nothing_but_python(install: ModuleType) -> None:
    """They run before anything is installed."""
    source = (ROOT / "scripts" / "install.py").read_text(encoding="utf-8")
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= sys.stdlib_module_names


def test_a_version_without_a_number_is_neither_newer_nor_older() -> None:
    complaint = VersionRange("torch", "2.11", "2.15").complaint("nightly")
    assert complaint == "torch 'nightly' has no number; foredraft was tested with 2.11 to 2.15"
