"""Quality of answers: programs that are run with limits, pass@k, ROUGE-2."""

import ctypes
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_cases import OPTIONS, TASKS, small_llm, task

from foredraft.bench import measure, quality, table
from foredraft.bench.asking import Run
from foredraft.bench.page import page
from foredraft.bench.pipeline import bench, check_tasks
from foredraft.bench.programs import has_test, program
from foredraft.bench.result import Bench
from foredraft.bench.sandbox import Limits, run_program
from foredraft.bench.tasks import Task
from foredraft.errors import ForedraftError, RequestError


@pytest.fixture(scope="module")
def found() -> Bench:
    return bench(small_llm(), TASKS, OPTIONS, name="tiny & <small>")


STUB = 'from math import floor\n\n\ndef half(x):\n    """Half of x.\n    >>> half(4)\n    2\n    """\n'
CHECK = "def check(candidate):\n    assert candidate(4) == 2\n    assert candidate(7) == 3\n"


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("    return floor(x / 2)\n\n\nprint(undefined)", True),  # only the first block counts
        ("\n    return x // 2", True),
        ("\treturn x // 2", True),
        ("Here it is:\n```python\ndef half(x):\n    return floor(x / 2)\n```\nDone.", True),
        ("def half(x):\n    return x >> 1", True),
        ("    return x", False),
        ("    return (", False),
        ("", False),
        ("    raise SystemExit(0)", False),  # leaves before the test
        ("    import os\n    os._exit(0)", False),
    ],
)
def test_programs_are_made_of_answers(answer: str, passes: bool) -> None:
    tested = task(0, STUB, test=CHECK, entry_point="half")
    assert run_program(program(tested, answer)).passed is passes
    examples = task(0, f"Complete the code I provided.\n\n{STUB}")
    assert has_test(examples) and not has_test(task(0, "Say >>> half(4)"))
    assert run_program(program(examples, answer)).passed is passes


@pytest.mark.parametrize(
    "line",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "x = bytearray(1 << 31)",
        "import socket; socket.socket()",
        "open('x', 'w')",
        "import os; os.open('x', os.O_CREAT)",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.kill(os.getppid(), 0)",
        "import ctypes; ctypes.CDLL(None)",
        "import shutil; shutil.rmtree('.')",
        "import os; os.mkfifo('x')",
        "import os; os.mknod('x')",
        "import os; os.utime('.', (1, 1))",
        "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 5)",
        "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CORE)",
        "import _posixsubprocess",
        "import _posixshmem; _posixshmem.shm_open('/foredraft', 66, mode=384)",
        "import sys\nwhile True: sys.__stdout__.write('x' * 100_000)",
        "import os\nwhile True: os.write(3, b'x' * 100_000)",
    ],
)
def test_programs_have_limits(line: str) -> None:
    outcome = run_program(line, Limits(seconds=0.6, memory=1 << 29))
    assert not outcome.passed and outcome.error


def test_a_program_that_takes_the_guard_apart_writes_no_file(tmp_path: Path) -> None:
    if not landlock():
        pytest.skip("needs a kernel with landlock")
    place = tmp_path / "x"
    undone = "import sys\nguard = sys.modules['__main__']\nguard.FORBIDDEN = ()\nguard.WRITING = 0\n"
    for line in (f"open({str(place)!r}, 'w')", f"import os; os.system('/usr/bin/touch {place}')"):
        run_program(undone + line, Limits(seconds=2))
        assert not place.exists()


def landlock() -> bool:
    """Whether the kernel has it: asked for its version."""
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, 0, 1) > 0


def test_programs_that_do_no_harm_pass() -> None:
    outcome = run_program("print('x' * 10**6)\nimport json, re, math, heapq, itertools, collections, typing")
    assert outcome.passed and outcome.network in ("namespace", "python")


def test_pass_at_k_is_the_chance_that_one_of_k_passes() -> None:
    assert quality.pass_at(10, 0, 1) == 0 and quality.pass_at(10, 10, 1) == 1
    assert quality.pass_at(10, 3, 1) == pytest.approx(0.3)
    assert quality.pass_at(5, 2, 2) == pytest.approx(1 - 3 / 5 * 2 / 4)


def answered(tasks: list[Task], answers: list[list[str]], arms: tuple[str, ...] = ("plain", "gamma 1")) -> list[Any]:
    """Requests with these answers, which came from nowhere."""
    return [
        measure.Request(
            measure.Place(it, index, sample, 0, 0),
            None,  # type: ignore[arg-type]
            [{arm: Run(1.0, (), text, None, ()) for arm in arms}],  # type: ignore[arg-type]
        )
        for index, it in enumerate(tasks)
        for sample, text in enumerate(answers[index])
    ]


def test_pass_rates_leave_out_tasks_whose_reference_fails() -> None:
    tasks = [
        task(0, STUB, test=CHECK, entry_point="half", references=("    return x // 2",)),
        task(1, STUB, test=CHECK, entry_point="half", references=("    return 0",)),
        task(2, "w1"),
    ]
    answers = [["    return x // 2", "    return 1"], ["    return x // 2"] * 2, ["w1", "w2"]]
    rates = quality.pass_rates(answered(tasks, answers), ["plain", "gamma 1"])
    assert rates is not None
    assert (rates.tasks, rates.samples, rates.unsound) == (1, 2, ("1",))
    assert rates.by_arm == {"plain": {1: 0.5}, "gamma 1": {1: 0.5}}
    assert quality.pass_rates(answered(tasks[2:], answers[2:]), ["plain"]) is None


def test_rouge_takes_the_best_reference_and_stops_at_the_next_article() -> None:
    pytest.importorskip("rouge_score")
    one = task(0, "w", category="summarization", references=("the cat sat down", "a dog ran far away"))
    requests = answered([one], [["a dog ran far away\nArticle: and more words than that"]])
    found = quality.rouge(requests, ["plain"])
    assert found is not None and found.by_arm == {"plain": 1.0} and found.tasks == 1
    assert quality.rouge(answered([task(1)], [["x"]]), ["plain"]) is None


def test_tables_have_quality_where_there_is_any(found: Bench) -> None:
    names = [arm.name for arm in found.arms]
    rated = replace(
        found,
        rouge=quality.Rouge(2, dict.fromkeys(names, 0.125)),
        pass_rates=quality.PassRates(1, 10, {name: {1: 0.5, 10: 1.0} for name in names}, ("7",), "python"),
    )
    rows = dict(table.tables(rated))["quality of the answers"]
    assert rows[0] == ("gamma", "ROUGE-2", "pass@1", "pass@10", "matchness", "speed-up")
    assert rows[1][:5] == ("plain", "0.1250", "0.500", "1.000", "-")
    assert any("leaves out 1 tasks" in line for line in table.lines(rated))
    assert "pass@10" in page(rated)


def test_what_a_run_needs_is_checked_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="no task has a test"):
        check_tasks(TASKS, replace(OPTIONS, run_code=True))
    monkeypatch.setitem(__import__("sys").modules, "rouge_score", None)
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ForedraftError, match=r"foredraft\[bench\]"):
        check_tasks([task(0, category="summarization", references=("a",))], OPTIONS)
