"""The peers' benchmark finds the models of each engine; running it takes environments that tests do not make."""

from argparse import ArgumentParser
from collections.abc import Iterator
from types import ModuleType

import pytest
from programs import BENCHMARKS, imported

from foredraft.llm import BUNDLED

FOLDER = BENCHMARKS / "peers"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """run.py, as it is from its own folder."""
    yield from imported("run", monkeypatch, FOLDER)


def chosen(run: ModuleType, *given: str) -> tuple[str, ...]:
    flags = ArgumentParser()
    run.add_flags(flags)
    return run.pair(flags.parse_args(given))


def test_shapes_have_folders_of_their_own(run: ModuleType) -> None:
    assert chosen(run) == (BUNDLED / "target", BUNDLED / "draft", "bundled")
    pair = chosen(run, "--shape", "344M")
    assert pair.name == "344M" and pair.target == run.RUNS / "models" / "344M" / "target"
    assert run.models("foredraft", pair) == {"target": str(pair.target), "draft": str(BUNDLED / "draft")}
    for engine, ending in (("llama_cpp", ".gguf"), ("openvino_genai", "-openvino")):
        assert run.models(engine, pair)["draft"] == str(run.RUNS / "models" / "344M" / f"draft{ending}")
    assert run.models(run.AVX512, pair) == run.models("llama_cpp", pair)
    assert run.models(run.LOOKUP, pair)["draft"] == "ngram"
    with pytest.raises(SystemExit, match="contradicts"):
        chosen(run, "--shape", "344M", "--target", "here")


def test_quantised_targets_have_files_of_their_own_and_the_same_draft(run: ModuleType) -> None:
    pair = chosen(run, "--shape", "1.0B")
    for weights, kind in (("int8", "Q8_0"), ("int4", "Q4_0")):
        for engine in ("llama_cpp", run.AVX512):
            found = run.models(engine, pair, weights)
            assert found["target"] == str(run.RUNS / "models" / "1.0B" / f"target-{kind}.gguf")
            assert found["draft"] == run.models(engine, pair)["draft"]
        assert run.models("foredraft", pair, weights) == run.models("foredraft", pair)  # rounded on loading
