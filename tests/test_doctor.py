"""`foredraft doctor`: what it finds here, what it says where something is broken, and what it keeps to itself."""

import io
import json
import platform
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny
from rich.console import Console
from typer.testing import CliRunner

from foredraft import LLM
from foredraft.cli.app import app
from foredraft.diagnosis import diagnose as module
from foredraft.diagnosis import machine, promises, report, serving
from foredraft.diagnosis.diagnose import Diagnosis, diagnose
from foredraft.diagnosis.promises import Promise
from foredraft.errors import RequestError
from foredraft.memory import Memory
from foredraft.native import library

INTEL = (
    "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Platinum 8481C\nflags\t\t: fpu sse4_2 avx2 fma avx512f amx_tile\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd i8mm sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    """The bundled pair on this machine."""
    return diagnose()


def shown(diagnosis: Diagnosis, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    report.show(diagnosis, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *args], prog_name="foredraft", catch_exceptions=False)


def states(found: list[Promise] | tuple[Promise, ...]) -> dict[str, str]:
    return {promise.name: promise.state for promise in found}


# --- the machine ---


def test_a_processor_is_known_by_name_and_instruction_sets() -> None:
    assert machine.processor(INTEL) == "Intel(R) Xeon(R) Platinum 8481C"
    assert machine.features(INTEL) == ("sse4_2", "avx2", "fma", "avx512f", "amx_tile")


def test_arm_gives_numbers_for_a_name() -> None:
    assert machine.processor(ARM) == "Arm, implementer 0x41, part 0xd4f"
    assert machine.features(ARM) == ("neon", "i8mm", "sve")


def test_what_the_system_does_not_tell_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "nothing")
    monkeypatch.setattr(machine, "memory", lambda: Memory(None, None))
    here = machine.look()
    assert (here.memory_total, here.memory_available) == (None, None)
    assert here.processor and here.cores >= 1


# --- all is well ---


def test_the_bundled_pair_is_well_here(found: Diagnosis) -> None:
    assert found.well and found.failure is None
    assert states(found.promises) | {"never slower": ""} == {
        "exact": "holds", "same seed": "holds", "never slower": "", "device": "holds",
    }  # fmt: skip


def test_versions_name_what_was_tested(found: Diagnosis) -> None:
    versions = {entry.package: entry for entry in found.versions}
    assert {"foredraft", "python", "torch", "transformers", "tokenizers", "safetensors", "numpy"} <= set(versions)
    assert versions["torch"].installed == torch.__version__
    assert all(versions[name].tested for name in ("torch", "transformers"))


def test_the_kernels_are_counted_layer_by_layer(found: Diagnosis) -> None:
    """12 layers of four fused products each, and the head."""
    assert found.serving and found.torch
    assert sum(found.serving.target.kernels.values()) == 49
    packed = "packed for oneDNN" if found.torch.packing["bfloat16"] else "plain"
    kernel = {"native": "bf16", "torch": packed}[found.serving.target.runtime]
    assert set(found.serving.target.kernels) == {kernel}
    assert found.serving.target.runtime == ("torch" if library.why_not() else "native")
    assert found.serving.draft and found.serving.draft.kernels


def test_other_models_layers_are_found_in_their_own_modules() -> None:
    llm = LLM(tiny("gpt2"), "int8", dtype="float32")
    described = serving.describe(llm, "gpt2", "int8", 0.0)
    assert (described.target.modules, described.target.runtime) == ("transformers' own", "torch")
    assert sum(described.target.kernels.values()) == 9  # four a layer, and the head
    assert described.draft and any("int8" in kernel for kernel in described.draft.kernels)


def test_a_runtime_may_describe_itself() -> None:
    model = LLM(tiny("llama"), "none").model
    itself = SimpleNamespace(
        config=model.config, device=model.device, dtype=model.dtype,
        runtime="native", instructions="avx2", kernels={"int4": 3},
    )  # fmt: skip
    served = serving.served(itself, "m")  # type: ignore[arg-type]
    assert (served.runtime, served.instructions, served.kernels) == ("native", "avx2", {"int4": 3})


def test_it_fits_80_columns(found: Diagnosis) -> None:
    assert max(map(len, shown(found).splitlines())) <= 80
    assert "all is well" in shown(found)


def test_json_has_all_of_it_and_nothing_of_the_user(found: Diagnosis) -> None:
    text = json.dumps(found.as_dict())
    told = json.loads(text)
    assert told["well"] is True
    assert set(told) == {"versions", "machine", "torch", "serving", "promises", "failure", "well"}
    assert platform.node() not in text and str(Path.home()) + "/" not in text


# --- something is broken ---


def test_a_model_that_does_not_load_is_reported_with_the_rest(found: Diagnosis) -> None:
    sick = diagnose("no/such/folder")
    assert not sick.well and sick.failure and sick.serving is None
    assert sick.failure.error.startswith("ModelError: no model at no/such/folder")
    assert sick.failure.where.startswith("foredraft/")
    assert sick.versions == found.versions and sick.torch
    assert "no model at" in " ".join(shown(sick).split())


def test_it_exits_with_1() -> None:
    done = run("--model", "no/such/folder", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["well"] is False


def test_weights_and_runtime_are_as_for_generate() -> None:
    told = json.loads(run("--draft", "ngram", "--weight-format", "int8", "--json").stdout)
    assert told["well"] and sum("int8" in kernel for kernel in told["serving"]["target"]["kernels"]) == 1
    told = json.loads(run("--draft", "ngram", "--runtime", "torch", "--json").stdout)
    assert told["well"] and told["serving"]["target"]["runtime"] == "torch"


def test_wrong_use_exits_with_2() -> None:
    assert run("--runtime", "x").exit_code == run("--weight-format", "int3").exit_code == 2
    assert run("--dtype", "fp12").exit_code == 2
    with pytest.raises(RequestError, match="fp12"):
        diagnose(dtype="fp12")


def test_an_error_nobody_raised_on_purpose_is_part_of_the_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError(f"forward() got an unexpected keyword\nin {Path.home()}/models")

    monkeypatch.setattr(serving, "LLM", broken)
    sick = diagnose()
    assert sick.failure and sick.failure.error == "TypeError: forward() got an unexpected keyword in ~/models"
    assert sick.failure.where.startswith("foredraft/diagnosis/serving.py:")


def test_where_torch_does_not_import_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(module, "_torch", missing)
    sick = diagnose()
    assert not sick.well and sick.torch is None and sick.machine.cores >= 1
    assert "libcudart" in shown(sick)


def test_a_folder_is_named_without_the_folders_above_it(tmp_path: Path) -> None:
    (tmp_path / "secret-project").mkdir()
    assert serving.label(str(tmp_path / "secret-project")) == "secret-project"
    assert serving.label("Qwen/Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B"


# --- promises ---


@pytest.fixture
def llm() -> LLM:
    return LLM(tiny("llama"), "ngram")


def test_without_exact_shapes_the_first_promise_is_broken(llm: LLM) -> None:
    llm.model.row_invariance = replace(llm.model.row_invariance, exact=False)
    (exact,) = (promise for promise in promises.check(llm) if promise.name == "exact")
    assert exact.state == "broken" and "no shapes" in exact.why


def test_a_text_that_changes_with_the_draft_breaks_both_promises(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = promises._decode

    def changing(llm: LLM, prompt: list[int], params: Any, length: int | None) -> Any:
        result = plain(llm, prompt, params, length)
        return replace(result, token_ids=[*result.token_ids[:-1], 0]) if length == 4 else result

    monkeypatch.setattr(promises, "_decode", changing)
    held = {promise.name: promise for promise in promises.check(llm)}
    assert held["exact"].state == held["same seed"].state == "broken"
    assert "drafting 4" in held["exact"].why and "drafting 1" not in held["exact"].why


def test_a_batch_that_changes_a_text_breaks_them_too(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = llm.generate

    def crowded(prompts: Any, *args: Any, **options: Any) -> Any:
        results = alone(prompts, *args, **options)
        return [replace(r, token_ids=[0]) for r in results] if isinstance(results, list) else results

    monkeypatch.setattr(llm, "generate", crowded)
    held = {promise.name: promise for promise in promises.check(llm)}
    assert held["exact"].state == "broken" and "a batch of three" in held["exact"].why


def test_a_slow_moment_breaks_nothing(found: Diagnosis) -> None:
    """The machine may be busy: speed is told, the exit code does not hang on it."""
    slow = replace(found, promises=(Promise("never slower", "unclear", "0.50 times as fast"),))
    assert slow.well and "unclear" in shown(slow)


def test_speed_is_seen_in_the_figures(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(llm: LLM, prompt: list[int], params: Any, length: int | None) -> Any:
        return SimpleNamespace(stats=SimpleNamespace(tokens_per_second=100.0 if length == 0 else rate))

    monkeypatch.setattr(promises, "_decode", decode)
    for rate, state in ((200.0, "holds"), (50.0, "unclear")):
        promise = promises.never_slower(llm, [1], None)  # type: ignore[arg-type]
        assert promise.state == state and f"{rate / 100:.2f} times as fast" in promise.why


def test_a_short_context_is_enough() -> None:
    llm = LLM(tiny("llama"), "ngram", max_model_len=12)
    assert set(states(promises.check(llm))) == {"exact", "same seed", "never slower", "device"}
