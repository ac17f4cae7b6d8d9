"""Prompts in every form the field has, and what is asked of a run."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_cases import task

from foredraft.bench.options import BenchOptions, read_lengths
from foredraft.bench.programs import has_test
from foredraft.bench.tasks import Task, bundled_tasks, read_tasks, spread
from foredraft.errors import RequestError


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"question_id": 81, "category": "writing", "turns": ["a", "b"]}, Task("81", "mt_bench", ("a", "b"))),
        ({"question_id": 3, "category": "qa", "turns": ["a"], "reference": ["x"]}, Task("3", "qa", ("a",), ("x",))),
        ({"question": "a", "answer": "4"}, Task("1", "", ("a",), ("4",))),
        (
            {
                "task_id": "HumanEval/0",
                "prompt": "def f():",
                "entry_point": "f",
                "canonical_solution": " 1",
                "test": "t",
            },
            Task("HumanEval/0", "code", ("def f():",), (" 1",), "t", "f"),
        ),
        (
            {"id": "u", "instruction": "do", "instances": [{"input": "it", "output": "done"}]},
            Task("u", "", ("do\n\nit",), ("done",)),
        ),
        ({"prompt": "\U0001f600"}, Task("1", "", ("\U0001f600",))),  # two halves, as json.dumps writes it
        ("just text", Task("1", "", ("just text",))),
        ({"turns": ["a"], "chat": False}, Task("1", "", ("a",), chat=False)),
    ],
)
def test_lines_in_every_known_form(tmp_path: Path, line: object, expected: Task) -> None:
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(line).encode()))
    assert read_tasks(path) == (replace(expected, line=1),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"turns": ["a"]}\n\n{"turns": ["a"', "line 3 is not JSON"),
        ('"a"\n[1]', "line 2 is no task"),
        ('"a"\n{"category": "qa"}', "line 2 is no task: it has no prompt"),
        ('{"turns": ["a", 7]}', "line 1 is no task: turns is"),
        ('{"turns": ["a", " "]}', "line 1"),
        ('{"prompt": "a", "category": 5}', "category is 5; it must be a text"),
        ('{"prompt": "a", "category": false}', "category is false"),
        ('{"prompt": 5}', "prompt is 5; it must be a text"),
        ('{"prompt": "a", "test": "' + "x" * 99 + '", "entry_point": ["f"]}', 'entry_point is ["f"]'),
        ('{"turns": ["' + "y" * 99 + '", 7]}', 'turns is ["' + "y" * 58 + "...;"),
        ('{"prompt": ""}', "prompt is empty"),
        ('{"prompt": " "}', "prompt is empty"),
        ('{"turns": []}', "turns is empty"),
        ("5", "line 1 is no task: 5; it must be"),
        ('{"prompt": "a", "chat": "yes"}', 'chat is "yes"'),
        ('{"prompt": "a", "chat": 1}', "chat is 1"),
        ('"a"\n{"prompt": "half \\ud83d of it"}', r"line 2 is no task: \ud83d is half a pair"),
        ('{"prompt": "a", "reference": ["\\udc00"]}', r"line 1 is no task: \udc00 is half a pair"),
        ("\n", "has no prompts"),
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "line 1 is not UTF-8 text (byte 0xff at 0)"),
        (b'"a"\n"caf\xe9"\n', "line 2 is not UTF-8 text (byte 0xe9 at 4)"),
    ],
)
def test_bad_lines_are_refused_by_their_number(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RequestError, match=r"prompts\.jsonl") as refusal:
        read_tasks(path)
    assert message in str(refusal.value)


def test_a_mark_before_the_first_line_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"caf\xc3\xa9"\n')
    assert [it.turns for it in read_tasks(path)] == [("caf\u00e9",)]


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl.gz"
    whole = gzip.compress(b'"a prompt of some length"' * 9)
    for data in (whole[:-9], whole[:12] + b"\xff" * 20, b"none"):
        path.write_bytes(data)
        with pytest.raises(RequestError, match="prompts cannot be read from"):
            read_tasks(path)


def test_a_limit_takes_from_all_categories() -> None:
    tasks = [task(i, category="a" if i < 6 else "b") for i in range(9)]
    assert [it.name for it in spread(tasks, 4)] == ["0", "1", "6", "7"]
    assert spread(tasks, None) == tuple(tasks)


def test_tasks_come_with_the_package() -> None:
    tasks = bundled_tasks()
    assert {it.category for it in tasks} == {"opening", "middle", "late", "conversation"}
    assert all(it.chat is (None if it.category == "conversation" else False) for it in tasks)
    assert len(tasks) == len({it.turns for it in tasks}) == 48


def test_published_sets_are_read(shared: Path) -> None:
    sets = {path.name: read_tasks(path) for path in sorted((shared / "data/prompts").glob("*.gz"))}
    assert len(sets["spec_bench.jsonl.gz"]) == 480
    columns = {it.category for it in sets["spec_bench.jsonl.gz"]}
    assert columns == {"mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"}
    assert all(has_test(it) for it in sets["humaneval.jsonl.gz"] if ">>>" in it.turns[0])
    assert all(it.references for it in sets["gsm8k_test.jsonl.gz"])


# --- what is asked ---


def test_draft_lengths_are_a_list_with_ranges() -> None:
    assert read_lengths("1-3, 8,policy,2") == (1, 2, 3, 8, None)


@pytest.mark.parametrize("text", ["", "0", "3-1", "x", "1,,2", "1-99999", "-1"])
def test_other_draft_lengths_are_named(text: str) -> None:
    with pytest.raises(RequestError, match="--gamma"):
        read_lengths(text)


@pytest.mark.parametrize("values", [{"rounds": 0}, {"samples": 0}, {"limit": 0}, {"samples": 2}, {"policy": "x"}])
def test_other_options_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(values))):
        BenchOptions(**values)
