"""The registry of drafters: one record each, and everything that lists drafters agrees with it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny

from foredraft import LLM, profile
from foredraft.cli.options import RunOptions
from foredraft.cli.reference import table
from foredraft.cli.tune import TuneFlags
from foredraft.drafters import DRAFTERS
from foredraft.drafters.registry import AUTO, drafting, with_profile
from foredraft.drafters.self_draft import SelfDrafter
from foredraft.errors import RequestError
from foredraft.models.base import SkipSet
from foredraft.models.load import wrap
from foredraft.tuning.candidates import SEARCHES
from foredraft.tuning.options import TuneOptions

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOREDRAFT_CACHE", str(tmp_path))
    profile.save(profile.profile_for(wrap(tiny("llama")), SkipSet((1,), ()), {}, profile.HowFound()))


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_record_says_what_it_makes(name: str, profiled: None) -> None:
    kind = DRAFTERS[name]
    drafter = LLM(tiny("llama"), name).drafter
    assert kind.name == name == drafter.name
    assert kind.own_weights == isinstance(drafter, SelfDrafter)
    assert kind.needs_profile == bool(getattr(drafter, "skip", SkipSet((), ())))
    assert kind.own_weights or not (kind.weight_format or kind.needs_profile)
    assert (kind.weight_format is not None) == (getattr(drafter, "weight_bytes", 0) > 0)


def test_names_that_others_know_are_the_registrys() -> None:
    assert AUTO in drafting() and "none" not in drafting()
    assert set(SEARCHES) == set(with_profile())
    with pytest.raises(RequestError, match=", ".join(map(re.escape, drafting()))):
        TuneOptions(without=("none",))
    for options, names in ((RunOptions, list(DRAFTERS)), (TuneFlags, drafting())):
        assert f"{', '.join(names)}" in table(options)


def test_the_readme_names_no_drafter_that_is_not_there() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Drafters\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r'`"([^"]+)"`', cell)}
    assert {"ngram", "int4"} <= named <= {*DRAFTERS, "auto"}


def test_listing_drafters_imports_no_torch() -> None:
    code = "import sys, foredraft.cli.app; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
