"""`foredraft bench`: what it prints, how it fails, what it refuses before it loads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_cases import interrupted, interrupted_after, other_tokens, words
from models import tiny
from typer.testing import CliRunner

from foredraft.bench import measure, pipeline
from foredraft.cli.app import app
from foredraft.cli.files import check_writable
from foredraft.errors import ForedraftError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny("llama").save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"turns": [f"w{i} w{i + 1}"], "category": "qa"}) for i in range(3)))
    return path


def run(*args: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, args)], prog_name="foredraft", catch_exceptions=False)


def flags(checkpoint: Path, prompts: Path) -> list[object]:
    given = ["--model", checkpoint, "--draft_model", "ngram", "--prompts", prompts]
    return [*given, "--gamma", "1,2", "--max_new_tokens", "8", "--rounds", "1"]


def test_command_prints_json_and_writes_a_page(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    done = run(*flags(checkpoint, prompts), "--json", "--html", tmp_path / "report.html")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["equal"] is True and [arm["name"] for arm in answer["arms"]] == ["plain", "gamma 1", "gamma 2"]
    assert answer["counts"]["tasks"] == 3 and answer["setting"]["drafter"] == "ngram"
    assert answer["prediction"]["speedups"][0] == 1.0
    assert str(checkpoint.parent) not in done.stdout
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not list(tmp_path.glob(".*"))


def test_command_prints_tables(checkpoint: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    done = run(*flags(checkpoint, prompts), "--limit", "1")
    assert done.exit_code == 0, done.stderr
    assert "speedup (inference time)" in done.stdout and "equal to plain decoding's in all 2 runs" in done.stdout
    done = run(*flags(checkpoint, prompts), "--limit", "1", "--markdown")
    assert "| gamma | speedup (inference time) | 95 % | speed up (num of forwards) |" in done.stdout


@pytest.mark.parametrize(("given", "runtime"), [(("--weight-format", "int8"), None), (("--runtime", "torch"), "torch")])
def test_weights_and_runtime_are_as_for_generate(
    checkpoint: Path, prompts: Path, given: tuple[str, ...], runtime: str | None
) -> None:
    plain, changed = (
        json.loads(run(*flags(checkpoint, prompts), "--limit", "1", "--json", *more).stdout) for more in ((), given)
    )
    assert changed["equal"] and changed["setting"]["runtime"] == (runtime or plain["setting"]["runtime"])
    smaller = changed["memory"]["target_weights"] < plain["memory"]["target_weights"]
    assert smaller == ("--weight-format" in given)


def test_command_fails_where_tokens_differ(checkpoint: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ask", other_tokens("gamma 2"))
    done = run(*flags(checkpoint, prompts))
    assert done.exit_code == 1
    assert "tokens: DIFFERENT from plain decoding's in 3 runs" in done.stdout
    assert "gamma 2, round 1, prompt 2 (line 2), turn 1, position 3" in done.stdout


def test_command_keeps_what_was_measured(checkpoint: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = measure.ask
    monkeypatch.setattr(measure, "ask", interrupted_after(3 + 3 * 2))
    done = run(*flags(checkpoint, prompts), "--json")
    assert done.exit_code == 130
    answer = json.loads(done.stdout)
    assert answer["interrupted"] and answer["counts"]["requests"] == 2 and answer["prediction"] is None
    with monkeypatch.context() as patched:
        patched.setattr(measure, "ask", ask)
        patched.setattr(pipeline, "predict", interrupted)
        done = run(*flags(checkpoint, prompts), "--json")
    assert done.exit_code == 130 and json.loads(done.stdout)["counts"]["requests"] == 3
    monkeypatch.setattr(measure, "ask", interrupted_after(1))
    done = run(*flags(checkpoint, prompts), "--json")
    assert done.exit_code == 130 and done.stdout == "" and "interrupted" in done.stderr


@pytest.mark.parametrize(
    ("given", "message", "code"),
    [
        (["--gamma", "x"], "--gamma 'x'", 2),
        (["--draft", "none"], "--draft none", 2),
        (["--rounds", "0"], "rounds=0", 2),
        (["--temperature", "-1"], "temperature", 2),
        (["--samples", "3"], "samples=3", 2),
        (["--policy", "x"], "policy", 2),
        (["--weight-format", "int3"], "int3", 2),
        (["--runtime", "x"], "runtime='x'", 2),
        (["--gpu", "x"], "--gpu 'x'", 2),
        (["--json", "--markdown"], "--json contradicts --markdown", 2),
        (["--gamma", "2", "--policy", "threshold"], "--policy threshold is used by no arm of --gamma 2", 2),
        (["--gamma", "2", "--draft-profile", "nosuch.json"], "--draft-profile contradicts --draft auto", 2),
        (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl", 2),
        (["--run-code"], "--run-code", 2),
        (["--html", "/nowhere/report.html"], "nothing was run", 1),
        (["--html", "/"], "nothing was run", 1),
    ],
)
def test_wrong_flags_cost_no_loading(given: list[str], message: str, code: int) -> None:
    done = run("--model", "/nowhere", *given)
    assert done.exit_code == code
    assert message in done.stderr and "does not load" not in done.stderr


@pytest.mark.parametrize("given", [["--json"], []], ids=str)
def test_a_full_disk_loses_no_figures(checkpoint: Path, prompts: Path, tmp_path: Path, given: list[str]) -> None:
    """It said "[Errno 28] No space left on device", after minutes of measuring."""
    report = tmp_path / "report.html"
    code = "import sys\nfrom foredraft.cli import main\nsys.argv[0] = 'foredraft'\nmain()"
    command = [sys.executable, "-c", code, "bench", *flags(checkpoint, prompts), *given, "--html", report]
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*map(str, command)], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "where the time goes" in done.stderr and report.exists()
    last = "foredraft: error: standard output cannot be written: No space left on device"
    assert done.stderr.splitlines()[-1] == last


def test_ctrl_c_while_all_is_taken_down_changes_no_exit_code() -> None:
    """A second Ctrl-C met libraries that take themselves down, and the process died by a signal."""
    code = (
        "import atexit, os, signal, sys\nfrom foredraft.cli import main\n"
        "class Late:\n  def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, 2)\n"
        "late = Late()\natexit.register(os.kill, os.getpid(), signal.SIGINT)\nsys.argv[1:] = ['--version']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("foredraft ")


def test_a_bad_line_costs_no_loading(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"turns": ["a"]}\n{"turn": 1}\n')
    done = run("--model", "/nowhere", "--prompts", tmp_path / "p.jsonl")
    assert done.exit_code == 2 and "p.jsonl, line 2 is no task" in done.stderr


def test_missing_extra_is_named(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    done = run("--model", "/nowhere", "--prompts", prompts, "--html", tmp_path / "x.html")
    assert done.exit_code == 1 and "pip install 'foredraft[bench]'" in done.stderr


def test_looking_whether_a_file_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.html").write_text("old")
    check_writable(tmp_path / "old.html")
    check_writable(tmp_path / "new.html")
    assert [it.name for it in tmp_path.iterdir()] == ["old.html"]
    with pytest.raises(ForedraftError, match="folder"):
        check_writable(tmp_path)
