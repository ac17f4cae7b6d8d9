"""`foredraft generate` with a form, as a user runs it: in a process of its own, on the bundled pair."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")
ROOT = Path(__file__).parents[1]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "größe": {"type": "integer", "maximum": 250}},
    "required": ["name", "größe"],
    "additionalProperties": False,
}
GRAMMAR = 'start: N ("+" N)~1..3\nN: /[1-9]/\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    files = {
        "person.json": json.dumps(PERSON, ensure_ascii=False),
        "sum.lark": GRAMMAR,
        "cut.json": '{"type": ',
        "bad.lark": 'start: "a" (\nfoo: "b"\n',
        "wrong.json": '{"properties": {"a": {"type": "strng"}}}',
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def generate(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    """Run in the folder of the files, offline."""
    changes = {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONIOENCODING": "utf-8"}
    asked = [sys.executable, "-m", "foredraft", "generate", *flags, "--max-new-tokens", "60", "A table for two."]
    env = os.environ | changes
    return subprocess.run(asked, capture_output=True, text=True, encoding="utf-8", cwd=folder, env=env, timeout=300)


@pytest.mark.parametrize("flags", [("--json",), ("--json", "--compare")])
def test_a_schema_in_a_file(folder, flags):
    done = generate(folder, "--json-schema", "person.json", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    jsonschema.validate(json.loads(found["text"]), PERSON)
    assert found["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "flags, pattern",
    [
        (("--regex", "[A-Z][a-z]{2,6} [0-9]{2}", "--temperature", "0.8", "--seed", "3"), "[A-Z][a-z]{2,6} [0-9]{2}"),
        (("--grammar", "sum.lark"), r"[1-9](\+[1-9]){1,3}"),
    ],
)
def test_a_pattern_and_a_grammar(folder, flags, pattern):
    done = generate(folder, *flags)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(pattern, done.stdout.strip())


def test_a_comparison_under_a_grammar_finds_no_difference(folder):
    done = generate(folder, "--grammar", "sum.lark", "--compare")
    assert done.returncode == 0, done.stderr
    assert "tokens: equal" in done.stdout


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (
            ("--json-schema", "nowhere.json"),
            "--json-schema nowhere.json cannot be read as text: No such file or directory; ",
        ),
        (
            ("--json-schema", '{"type": "integer"}'),
            '--json-schema takes the name of a file; write \'{"type": "integer"}\' ',
        ),
        (("--json-schema", "/dev/zero"), "more than 10 MiB"),
        (("--json-schema", "cut.json"), "cut.json: the schema is no JSON: Expecting value in line 1, column 10"),
        (("--json-schema", "wrong.json"), "wrong.json: the JSON schema cannot be compiled at #/properties/a"),
        (("--regex", "a("), "unclosed group at '(' in 'a('"),
    ],
)
def test_bad_forms_are_told_without_a_traceback(folder, flags, complaint):
    done = generate(folder, *flags)
    told = " ".join(done.stderr.split())
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert complaint in told and "Traceback" not in told


def test_the_lines_of_a_bad_grammar_are_shown_with_the_mark_under_its_place(folder):
    told = generate(folder, "--grammar", "bad.lark").stderr
    assert told.startswith("foredraft: error: bad.lark: the grammar cannot be compiled: 1(13): Expected token ')'")
    lines = told.splitlines()
    at = next(i for i, line in enumerate(lines) if line.endswith(' | start: "a" ('))
    assert lines[at + 1].strip() == "^" and lines[at + 2].endswith(' | foo: "b"')
    assert lines[at + 1].index("^") == len(lines[at])  # the line break after the bracket


@pytest.mark.parametrize("command", ["chat", "audit"])
def test_a_bad_pattern_is_told_once_before_anything_loads(folder, command):
    asked = [sys.executable, "-m", "foredraft", command, "--model", "nowhere/at-all", "--regex", "(ab"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(asked, input="a\nb\n", capture_output=True, text=True, cwd=folder, env=env, timeout=300)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("unclosed group") == 1
