"""The bench: prompts, arms in turn, equality, figures, quality of answers, the command, the page in a browser."""

import gzip
import json
import os
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import VOCAB, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from foredraft import LLM, SamplingParams
from foredraft.bench import figures, measure, pipeline, plots, prediction, quality, table
from foredraft.bench.asking import Run
from foredraft.bench.options import BenchOptions, read_lengths
from foredraft.bench.page import page
from foredraft.bench.pipeline import bench, check_tasks
from foredraft.bench.programs import has_test, program
from foredraft.bench.result import Bench
from foredraft.bench.sandbox import Limits, run_program
from foredraft.bench.tasks import Task, bundled_tasks, read_tasks, spread
from foredraft.cli.app import app
from foredraft.cli.files import check_writable
from foredraft.drafters.memory import SuffixMemory
from foredraft.drafters.suffix import SuffixDrafter
from foredraft.errors import ForedraftError, RequestError
from foredraft.policy import Gain

TOKENS = 12
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def words() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="w0")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny("llama"), "ngram", tokenizer=words(), max_batch_size=1)


@pytest.fixture(scope="module", autouse=True)
def brief() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "COST_LAPS", 1)
        yield


def task(index: int, *turns: str, **values: Any) -> Task:
    return Task(
        str(index), values.pop("category", "a" if index % 2 else "b"), turns or (f"w{index} w{index + 1}",), **values
    )


TASKS = (*tuple(task(i) for i in range(3)), task(3, "w5 w6", "w7"))
OPTIONS = BenchOptions((1, 3, None), SamplingParams(max_new_tokens=TOKENS), rounds=2, predict=False)


@pytest.fixture(scope="module")
def found(llm: LLM) -> Bench:
    return bench(llm, TASKS, replace(OPTIONS, predict=True), name="tiny & <small>")


# --- prompts ---


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
        ('{"prompt": "a", "category": 5}', "category is '5'"),
        ('{"prompt": "a", "chat": "yes"}', "chat is 'yes'"),
        ("\n", "has no prompts"),
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_bad_lines_are_refused_by_their_number(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RequestError, match=r"prompts\.jsonl") as refusal:
        read_tasks(path)
    assert message in str(refusal.value)


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


# --- measuring ---


def test_arms_take_turns_on_the_same_prompts_with_policies_of_their_own(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[tuple[int, ...], int | None]] = []
    ask = measure.ask

    def noted(llm: LLM, prompt: Any, params: Any, length: int | None, memory: str) -> Run:
        asked.append((prompt.token_ids, length))
        return ask(llm, prompt, params, length, memory)

    monkeypatch.setattr(measure, "ask", noted)
    arms = measure.make_arms(llm, OPTIONS)
    assert len({id(arm.policy) for arm in arms}) == len(arms)
    assert isinstance(arms[-1].policy, Gain)
    result = measure.measure(llm, TASKS[:2], OPTIONS)
    groups = [asked[i : i + 4] for i in range(4, len(asked), 4)]  # after the warm-up
    assert [[length for _, length in group] for group in groups] == [[0, 1, 3, None], [None, 3, 1, 0]] * 1 + [
        [None, 3, 1, 0],
        [0, 1, 3, None],
    ]
    assert all(len({prompt for prompt, _ in group}) == 1 for group in groups)
    assert all(len(it.rounds) == 2 for it in result.requests.values())
    assert llm.drafter.name == "ngram"


def test_later_turns_follow_what_plain_decoding_said(llm: LLM) -> None:
    result = measure.measure(llm, TASKS[3:], OPTIONS)
    first, second = result.requests[0, 0, 0], result.requests[0, 0, 1]
    said = [*first.prompt.token_ids, *first.reference.token_ids, *llm.encode("w7")]
    assert list(second.prompt.token_ids) == said


def test_no_arm_drafts_from_what_another_wrote(llm: LLM) -> None:
    """Each prompt comes again in every arm and round; a memory of its answer would accept everything."""

    def accepted(drafter: SuffixDrafter) -> set[int]:
        own = LLM(tiny("llama"), drafter, tokenizer=words(), max_batch_size=1)
        result = measure.measure(own, TASKS[:1], replace(OPTIONS, lengths=(3,), rounds=3))
        return {runs["gamma 3"].stats.accepted for runs in result.requests[0, 0, 0].rounds}

    assert accepted(SuffixDrafter(SuffixMemory(VOCAB))) == accepted(SuffixDrafter())


def test_samples_have_seeds_of_their_own(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=TOKENS, temperature=1.0, seed=5)
    result = measure.measure(llm, TASKS[:2], replace(OPTIONS, params=params, samples=3, rounds=1))
    assert [it.place.seed for it in result.requests.values()] == list(range(5, 11))
    assert len({it.reference.token_ids for it in result.requests.values()}) == 6
    assert not result.differences()


def other_tokens(arm: str) -> Callable[..., Run]:
    """`measure.ask`, with the fourth token of an arm's answers changed."""
    ask = measure.ask

    def changed(llm: LLM, prompt: Any, params: Any, length: int | None, memory: str) -> Run:
        run = ask(llm, prompt, params, length, memory)
        tokens = (*run.token_ids[:3], run.token_ids[3] + 1, *run.token_ids[4:])
        return replace(run, token_ids=tokens) if memory.startswith(arm) else run

    return changed


def test_a_difference_is_found_and_said(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ask", other_tokens("gamma 3"))
    result = bench(llm, TASKS[:2], replace(OPTIONS, rounds=1))
    assert result.equal is False
    assert {(it.arm, it.position, it.task) for it in result.differences} == {("gamma 3", 3, "0"), ("gamma 3", 3, "1")}
    assert any("DIFFERENT" in line for line in table.lines(result))
    assert result.as_dict()["equal"] is False


def test_the_rejection_verifier_promises_no_equal_tokens(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=TOKENS, temperature=1.0, verifier="rejection")
    result = bench(llm, TASKS[:2], replace(OPTIONS, params=params, rounds=1))
    assert result.equal is None and not result.differences and not result.promised


def test_an_interrupt_keeps_whole_requests(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ask", interrupted_after(4 + 4 * 2 + 1))  # the warm-up, two requests, and a run
    result = bench(llm, TASKS, OPTIONS)
    assert result.interrupted and result.counts.requests == 2
    assert any(line.startswith("interrupted") for line in table.lines(result))
    monkeypatch.setattr(measure, "ask", interrupted_after(3))
    with pytest.raises(KeyboardInterrupt):
        bench(llm, TASKS, OPTIONS)
    assert not llm.runner.has_work and llm.drafter.name == "ngram"


@pytest.mark.parametrize("phase", ["predict", "pass_rates", "rouge"])
def test_an_interrupt_later_keeps_all_that_was_measured(llm: LLM, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """It ended as if nothing had been missing: exit code 0, "interrupted": false."""
    monkeypatch.setattr(quality if phase != "predict" else pipeline, phase, interrupted)
    tasks = [replace(it, category="summ", references=("w1",), test="t") for it in TASKS[:2]]
    options = replace(OPTIONS, rounds=1, predict=phase == "predict", run_code=phase == "pass_rates")
    result = bench(llm, tasks, options)
    assert result.interrupted and result.as_dict()["interrupted"] and result.counts.requests == 2
    assert result.prediction is None and result.pass_rates is None and (result.rouge is None) is (phase == "rouge")
    assert any(line.startswith("interrupted") for line in table.lines(result)) and llm.drafter.name == "ngram"


def interrupted_after(count: int) -> Callable[..., Run]:
    ask, left = measure.ask, [count]

    def interrupted(*args: Any) -> Run:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return ask(*args)

    return interrupted


def test_prompts_without_room_are_left_out_and_counted(llm: LLM) -> None:
    long = " ".join(["w1"] * (llm.max_model_len - TOKENS))
    result = bench(llm, [*TASKS[:1], task(7, long + " w2"), task(8, "w3", long)], OPTIONS)
    assert result.counts.tasks == 2 and result.counts.left_out == 2
    assert any("left out: 2" in line for line in table.lines(result))
    with pytest.raises(RequestError, match="fit the context"):
        bench(llm, [task(7, long + " w2")], OPTIONS)


def test_what_cannot_be_measured_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="nothing is drafted"):
        bench(LLM(tiny("llama"), "none", tokenizer=words()), TASKS, OPTIONS)
    most = llm.model.row_invariance.max_draft_tokens
    with pytest.raises(RequestError, match=f"gamma {most + 1}"):
        bench(llm, TASKS, replace(OPTIONS, lengths=(most + 1,)))


# --- figures ---


def test_speedup_is_of_totals_and_its_interval_draws_tasks() -> None:
    same = figures.speedup([0, 1, 2], [2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (same.value, same.low, same.high) == (2.0, 2.0, 2.0)
    mixed = figures.speedup([0, 1, 2, 3], [2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0])
    assert mixed.value == pytest.approx(8 / 6)
    assert 1.0 <= mixed.low < mixed.value < mixed.high <= 2.0
    one = figures.speedup([4, 4], [2.0, 2.0], [1.0, 3.0])  # two turns of one task tell nothing about others
    assert one.low == one.value == one.high == 1.0


def test_the_interval_covers_as_often_as_it_says() -> None:
    source = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        plain, own = source.gamma(4, 1, 40), source.gamma(4, 0.5, 40)
        hits += (it := figures.speedup(range(40), plain, own)).low <= 2.0 <= it.high
    assert 180 <= hits <= 200


def test_figures_are_those_of_the_runs(found: Bench) -> None:
    assert [arm.name for arm in found.arms] == ["plain", "gamma 1", "gamma 3", "policy"]
    assert found.plain.speedup.value == found.plain.pass_speedup == 1.0
    assert found.counts.requests == 5 and found.counts.tokens == 5 * TOKENS == found.plain.stats.target_passes
    for arm in found.drafting:
        assert arm.pass_speedup == pytest.approx(arm.stats.mean_acceptance_length)
        assert arm.stats.output_tokens == 5 * TOKENS
        assert set(arm.categories) == {"a", "b"} and sum(it.requests for it in arm.categories.values()) == 5
        assert arm.times.total > 0 and arm.seconds_to_first_token > 0 and arm.seconds_per_token > 0
    assert found.equal and found.promised
    for steps in found.timeline.values():
        assert steps[-1][1] == TOKENS and list(steps) == sorted(steps)
    arm = json.loads(json.dumps(found.as_dict()))["arms"][1]
    assert "tokens_per_second" not in arm  # which is what `stats` calls the first round's
    assert arm["median_tokens_per_second"] == found.drafting[0].median_tokens_per_second


def test_prediction_of_a_perfect_draft_is_one_minus_nothing(llm: LLM) -> None:
    own = LLM(tiny("llama"), tiny("llama"), tokenizer=words(), max_batch_size=1)
    result = bench(own, TASKS[:2], replace(OPTIONS, lengths=(2,), rounds=1, predict=True))
    assert result.prediction is not None and result.prediction.alpha == 1.0
    assert result.drafting[0].stats.draft_acceptance_rate == 1.0
    assert result.predicted(result.drafting[0]) is not None and result.predicted(result.plain) is None
    assert result.memory.draft_weights > 0


def test_prediction_of_several_drafters_is_the_best_ones(llm: LLM) -> None:
    """It was of the first that had a draft, which is not who drafts."""
    own = LLM(tiny("llama"), ["ngram", tiny("llama")], tokenizer=words(), max_batch_size=1)
    assert bench(own, TASKS[:2], replace(OPTIONS, lengths=(2,), rounds=1, predict=True)).prediction is not None
    a, b = prediction.Prediction(0.5, 0.1, (1.0, 1.2)), prediction.Prediction(0.9, 0.3, (1.0, 1.1, 1.7))
    assert prediction._best([a, b]) == replace(b, speedups=(1.0, 1.2, 1.7))


def test_predicting_remembers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for the same texts again and again, which a memory of outputs would draft whole."""
    memory = SuffixMemory(VOCAB)
    own = LLM(tiny("llama"), SuffixDrafter(memory), tokenizer=words(), max_batch_size=1)
    before: list[int] = []
    measured = prediction.measure
    monkeypatch.setattr(prediction, "measure", lambda *a, **k: (before.append(memory.nbytes), measured(*a, **k))[1])
    assert bench(own, TASKS[:2], replace(OPTIONS, lengths=(2,), rounds=1, predict=True)).prediction
    assert before == [memory.nbytes] and own.drafter.memory is memory  # type: ignore[attr-defined]


# --- tables ---


def test_tables_have_the_columns_of_those_they_follow(found: Bench) -> None:
    tables = dict(table.tables(found))
    speed = next(iter(tables.values()))
    assert speed[0][:4] == ("gamma", "speedup (inference time)", "95 %", "speed up (num of forwards)")
    assert [row[0] for row in speed[1:]] == ["plain", "1", "3", "policy"]
    assert tables["speed-up by category"][0] == ("gamma", "b", "a", "#MAT", "Overall")
    assert all(len({len(row) for row in rows}) == 1 for rows in tables.values())
    assert table.as_markdown((("a", "b"), ("1", "2"))) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_a_category_ends_no_cell_of_markdown() -> None:
    assert table.as_markdown((("a|b", "c\nd"), ("\\", "2"))) == "| a\\|b | c d |\n|---|---|\n| \\\\ | 2 |"


# --- quality ---

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
    ],
)
def test_programs_have_limits(line: str) -> None:
    outcome = run_program(line, Limits(seconds=0.6, memory=1 << 29))
    assert not outcome.passed and outcome.error


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


# --- the page ---


def test_the_page_names_nothing_outside_itself(found: Bench) -> None:
    text = page(found)
    assert "tiny &amp; &lt;small&gt;" in text and "<small>, drafted" not in text
    assert text.count("<svg") == 4 and "prefers-color-scheme: dark" in text
    for stand_in in plots.COLOURS.values():
        assert stand_in not in text
    assert "#000000" not in text and "default-src 'none'" in text.replace("&#x27;", "'")
    assert "<script" not in text and "@import" not in text and "@font-face" not in text
    links = [part.split('"')[0] for part in text.replace("src=", "href=").split('href="')[1:]]
    assert all(link.startswith(("#", "data:")) for link in links)
    ids = [part.split('"')[0] for part in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


class Proxy(socketserver.ThreadingTCPServer):
    """Notes the first line of whatever is sent to it, and answers nothing."""

    daemon_threads = allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Note)
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Note(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.server.asked.append(self.rfile.readline().decode("latin-1").strip())  # type: ignore[attr-defined]


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as server:
        yield server
        server.shutdown()


def browse(path: Path, proxy: Proxy, picture: Path, *, dark: bool) -> Any:
    """A picture of the page, and in `proxy.asked` what the browser asked the network for."""
    from matplotlib.image import imread

    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync "
        "--disable-component-update --disable-quic --disable-extensions --disable-default-apps --hide-scrollbars "
        f"--window-size=1280,2400 --blink-settings=preferredColorScheme={0 if dark else 1} "
        f"--proxy-server=127.0.0.1:{proxy.server_address[1]} --proxy-bypass-list=<-loopback>"
    )
    assert CHROMIUM is not None
    profile = f"--user-data-dir={picture.parent / 'chromium'}"
    command = [CHROMIUM, *flags.split(), profile, f"--screenshot={picture}", path.as_uri()]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    return imread(picture)


def has(picture: Any, colour: tuple[int, int, int]) -> int:
    """How many pixels are of this colour."""
    return int((np.abs(picture[..., :3] * 255 - colour).max(-1) < 3).sum())


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, to look at the report")
def test_the_page_in_a_browser(found: Bench, proxy: Proxy, tmp_path: Path) -> None:
    """Light and dark, drawn in the page's own colours, without a word to the network. Pictures are kept where
    FOREDRAFT_ARTEFACTS says."""
    report = tmp_path / "report.html"
    report.write_text(page(found), encoding="utf-8")
    kept = Path(os.environ.get("FOREDRAFT_ARTEFACTS", tmp_path))
    light, dark = (browse(report, proxy, kept / f"bench-{name}.png", dark=name == "dark") for name in ("light", "dark"))
    assert has(light, (0xF4, 0xF5, 0xF8)) > 100_000 > has(light, (0x0F, 0x11, 0x16))
    assert has(dark, (0x0F, 0x11, 0x16)) > 100_000 > has(dark, (0xF4, 0xF5, 0xF8))
    assert has(light, (0x2F, 0x62, 0xD9)) > 2000 and has(dark, (0x7A, 0xA2, 0xFF)) > 2000  # bars and lines
    own = [line for line in proxy.asked if "google" not in line and "gvt" not in line]  # the browser's own affairs
    assert own == []
    report.write_text(page(found).replace("</main>", '<img src="http://foredraft.invalid/x.png"></main>'), "utf-8")
    browse(report, proxy, tmp_path / "control.png", dark=False)
    assert not any("foredraft.invalid" in line for line in proxy.asked)  # the page itself forbids it
    report.write_text('<img src="http://foredraft.invalid/x.png">')
    browse(report, proxy, tmp_path / "control.png", dark=False)
    assert any("foredraft.invalid" in line for line in proxy.asked)  # and we would have heard it


# --- the command ---


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


def test_command_fails_where_tokens_differ(checkpoint: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ask", other_tokens("gamma 2"))
    done = run(*flags(checkpoint, prompts))
    assert done.exit_code == 1
    assert "tokens: DIFFERENT from plain decoding's in 3 runs" in done.stdout
    assert "gamma 2, round 1, prompt 2 (line 2), turn 1, position 3" in done.stdout


def interrupted(*args: object) -> None:
    raise KeyboardInterrupt


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
        (["--gpu", "x"], "--gpu 'x'", 2),
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
