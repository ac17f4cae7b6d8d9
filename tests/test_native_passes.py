"""The benchmark of native passes: arms are of the instruction set and format that they name, and rates are right."""

import json
import shutil
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from programs import imported

from foredraft.models.native import NativeModel
from foredraft.native import library

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
LAYERS = 256 * (4 + 1 + 1 + 4) * 64 + 3 * 256 * 768  # weights of the bundled draft's one layer, and of its head
HEAD = 4096 * 256


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    yield from imported("native_passes", monkeypatch)
    torch.set_num_threads(threads)


def test_every_arm_is_there_and_rates_are_those_of_its_time(
    passes: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = "--shapes draft --points 2x3 1x65@0 --rounds 1 --threads 1 --out".split()
    monkeypatch.setattr(passes, "LINEARS", ((64, 128),))
    monkeypatch.setattr(passes, "SECONDS", 0.0)
    monkeypatch.setattr(sys, "argv", ["native_passes.py", *flags, str(tmp_path / "out.json")])
    passes.main()
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    kinds = [f"{form}, {isa}" for form in ("bf16", "int8", "int4") for isa in library.load().isas]
    assert list(results["a linear layer alone"]) == kinds
    assert list(results["passes"]) == [f"draft, {kind}, {at}" for kind in kinds for at in ("2x3@200", "1x65@0")]
    for name, found in results["passes"].items():
        ms, kind = found["ms"]["median"], name.removeprefix("draft, ").rpartition(", ")[0]
        rows, wanted = (6, 6) if "2x3" in name else (65, 1)
        assert found["rows_per_s"] == pytest.approx(rows / ms * 1e3)
        assert found["gflops"] == pytest.approx(2e-6 * (LAYERS * rows + HEAD * wanted) / ms)
        alone = results["a linear layer alone"][kind]
        assert found["of_layer_alone"] == pytest.approx(found["gflops"] / alone["gflops"])
        if kind.startswith("bf16, "):
            assert found["weights_gb_per_s"] == pytest.approx(2e-6 * (LAYERS + HEAD) / ms)


def test_a_layer_alone_counts_at_its_best_rate(passes: ModuleType) -> None:
    times = {"int8, avx2, few": {"median": 2.0}, "int8, avx2, many": {"median": 3.0}}
    found = passes.best({"int8, avx2, few": 2 * 10**6, "int8, avx2, many": 6 * 10**6}, times)
    assert found == {"gflops": 2.0, "of": "many", "ms": {"median": 3.0}}


def test_models_are_what_their_names_say(passes: ModuleType) -> None:
    plain = NativeModel(passes.random_llama(passes.configs()["draft"]), library.load())
    for form in passes.FORMATS:
        for isa in library.load().isas:
            model = passes.model_with(passes.model_in(plain, form), isa)
            assert model.kernels == {form: 5}
            assert library.ISAS[model.call.struct.isa] == model.instructions == isa


@pytest.mark.parametrize("text", ["8", "0x4", "8x0", "8x4@", "8x4x2", "-1x4"])
def test_what_is_no_point_is_refused(passes: ModuleType, text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="TEXTSxROWS"):
        passes.point(text)


def test_points(passes: ModuleType) -> None:
    assert [passes.point(text) for text in ("8x4", "1x256@0")] == [passes.Point(8, 4, 200), passes.Point(1, 256, 0)]


def test_libraries_take_turns_by_their_names(
    passes: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [Path("one.so"), Path("two.so")]
    for name in names:
        shutil.copy(Path(library.__file__).with_name(library.NAME), name)
    found = passes.built(names)
    assert list(found) == ["one.so, ", "two.so, "]
    assert len({made.functions._handle for made in found.values()}) == 2
    assert passes.built(None) == {"": library.load()}
    assert passes.built(names[:1]) == {"": found["one.so, "]}
