"""The public names: they import, docs/api.md tells of each, and nothing else is public by accident."""

import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import foredraft

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def api_page():
    spec = spec_from_file_location("api_page", ROOT / "scripts" / "api_page.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", foredraft.__all__)
def test_every_public_name_imports_and_is_documented(name: str) -> None:
    assert getattr(foredraft, name) is not None
    assert name == "__version__" or getattr(foredraft, name).__name__ == name
    assert f"| `{name}" in PAGE


def test_the_page_is_what_the_code_says() -> None:
    assert api_page().embed(PAGE) == PAGE, "run: python scripts/api_page.py"


def test_every_name_of_the_library_itself_has_a_line() -> None:
    (own,) = [part for part in PAGE.split("### ") if part.startswith("foredraft\n")]
    assert [line for line in own.splitlines() if line.endswith("|  |")] == []


def test_a_change_of_the_code_is_noticed() -> None:
    changed = PAGE.replace("num_draft_tokens=None", "num_draft_tokens=0")
    assert changed != PAGE and api_page().embed(changed) == PAGE


def test_nothing_is_public_by_accident() -> None:
    """In a fresh interpreter, where nobody has imported a submodule yet."""
    code = "import foredraft; print(sorted(vars(foredraft).keys() - set(foredraft.__all__)), dir(foredraft))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names, listed = shown.strip().split("] [")
    assert [name for name in names.strip("[").split(", ") if name and not name.startswith("'_")] == []
    assert listed == str(sorted(foredraft.__all__))[1:]


def test_the_homes_of_lazy_names_are_the_public_names() -> None:
    assert set(foredraft._HOMES) | {"__version__"} == set(foredraft.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'foredraft' has no attribute 'nothing'"):
        _ = foredraft.nothing


@pytest.mark.parametrize("folder", ["", "models", "weights", "integrations"])
def test_the_architecture_page_names_every_module(folder: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (layers,) = [block for block in page.split("```") if "\nllm  " in block]
    package = ROOT / "src" / "foredraft" / folder
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {name for name in modules if not name.startswith("__")} - set(re.findall(r"\w+", layers)) == set()
