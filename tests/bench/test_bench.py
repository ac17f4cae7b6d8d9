"""The bench measures: arms in turn, equality, what an interrupt keeps, figures and the prediction."""

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bench_cases import OPTIONS, TASKS, TOKENS, interrupted, interrupted_after, other_tokens, task, words
from models import VOCAB, tiny
from rich.console import Console

from foredraft import LLM, SamplingParams
from foredraft.bench import figures, measure, pipeline, prediction, quality, table
from foredraft.bench.asking import Run
from foredraft.bench.page import page
from foredraft.bench.pipeline import bench
from foredraft.bench.result import Bench
from foredraft.drafters.memory import SuffixMemory
from foredraft.drafters.suffix import SuffixDrafter
from foredraft.errors import RequestError
from foredraft.policy import Gain
from foredraft.tuning.acceptance import Acceptance
from foredraft.tuning.costs import Costs, DraftCost, StepCosts

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
    same = figures.speedup(range(6), [2.0, 4.0, 6.0] * 2, [1.0, 2.0, 3.0] * 2)
    assert (same.value, same.low, same.high) == (2.0, 2.0, 2.0)
    mixed = figures.speedup(range(8), [2.0] * 8, [1.0, 1.0, 2.0, 2.0] * 2)
    assert mixed.value == pytest.approx(8 / 6) and mixed.bounds
    assert 1.0 <= mixed.bounds[0] < mixed.value < mixed.bounds[1] <= 2.0


def test_few_prompts_have_no_interval(found: Bench) -> None:
    """One prompt printed "1.20x 1.20-1.20", as if others had to give the same."""
    one = figures.speedup([4] * 9, [2.0] * 9, [1.0, 3.0, 2.0] * 3)  # turns of one task tell nothing about others
    assert one.value == 1.0 and one.bounds is None
    assert figures.speedup(range(5), [2.0] * 5, [1.0] * 5).bounds is None
    assert found.counts.tasks < figures.FEWEST
    speed = next(iter(dict(table.tables(found)).values()))
    assert [row[2] for row in speed[1:]] == ["", "-", "-", "-"]
    assert any("no intervals: fewer than 6 prompts" in line for line in table.lines(found))
    assert "95 %:" not in page(found) and found.as_dict()["arms"][1]["speedup"]["low"] is None


def test_the_interval_covers_as_often_as_it_says() -> None:
    source = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        plain, own = source.gamma(4, 1, 40), source.gamma(4, 0.5, 40)
        low, high = figures.speedup(range(40), plain, own).bounds or (0.0, 0.0)
        hits += low <= 2.0 <= high
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
    own = LLM(tiny("llama"), tiny("llama"), tokenizer=words(), max_batch_size=1, draft_weight_format="none")
    result = bench(own, TASKS[:2], replace(OPTIONS, lengths=(2,), rounds=1, predict=True))
    assert result.prediction is not None and result.prediction.alpha == 1.0
    assert result.drafting[0].stats.draft_acceptance_rate == 1.0
    assert result.predicted(result.drafting[0]) is not None and result.predicted(result.plain) is None
    assert result.memory.draft_weights > 0


def test_prediction_of_several_drafters_is_the_best_ones(llm: LLM) -> None:
    """It was of the first that had a draft, which is not who drafts."""
    own = LLM(tiny("llama"), ["ngram", tiny("llama")], tokenizer=words(), max_batch_size=1)
    assert bench(own, TASKS[:2], replace(OPTIONS, lengths=(2,), rounds=1, predict=True)).prediction is not None
    a, b = prediction.Prediction(0.5, 0.1, 0.0, (1.0, 1.2)), prediction.Prediction(0.9, 0.3, 0.0, (1.0, 1.1, 1.7))
    assert prediction._best([a, b]) == replace(b, speedups=(1.0, 1.2, 1.7))
    slow = replace(a, speedups=(1.0, 0.4)), replace(b, speedups=(1.0, 0.9))  # without drafts both are plain decoding
    assert prediction._best(slow) == slow[1]


def test_what_a_draft_costs_whatever_its_length_is_told(found: Bench) -> None:
    """A token's price alone was told, which is a tenth of what a draft of one token costs."""
    steps, price = StepCosts((0, 1), (2.0, 2.0)), DraftCost(1.0, 0.5)
    acceptance = Acceptance(((1, 1, 1, 1),), 1.0, 1)
    told = prediction._predicted(Costs(steps), price, acceptance, OPTIONS)
    assert (told.draft_ratio, told.cost_ratio) == (0.5, 0.25)
    line = next(it for it in table.lines(replace(found, prediction=told)) if it.startswith("alpha"))
    assert "a draft costs 0.50 plain steps and 0.25 more for each token" in line


def test_a_prediction_that_fails_is_told(found: Bench) -> None:
    arm = found.drafting[0]
    for factor, told in ((1.1, False), (1.2, True), (0.8, True)):
        other = prediction.Prediction(0.9, 0.1, 0.5, (1.0, factor * arm.speedup.value))
        lines = [*table.warnings(replace(found, prediction=other))]
        assert any("more than 15% apart at gamma 1:" in line for line in lines) is told


def test_a_draft_of_one_token_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line through two and six tokens says little of one."""
    own, lengths = LLM(tiny("llama"), "ngram", tokenizer=words(), max_batch_size=1), set[int]()
    measured = prediction.measure

    def noted(llm: LLM, text: Any, turns: Any, **options: Any) -> Any:
        lengths.update(turn.gamma for turn in turns if turn.name == "ngram")
        return measured(llm, text, turns, **options)

    monkeypatch.setattr(prediction, "measure", noted)
    bench(own, TASKS[:2], replace(OPTIONS, lengths=(2,), rounds=1, predict=True))
    assert 1 in lengths and len(lengths) > 2


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


@pytest.mark.parametrize("width", [80])
def test_no_word_of_a_table_is_cut(found: Bench, width: int) -> None:
    names = ("mt_bench", "translation", "summarization", "math_reasoning", "retrieval", "int4+skip")
    arms = [replace(it, categories=dict.fromkeys(names, it.categories["a"])) for it in found.arms]
    text = io.StringIO()
    table.show(replace(found, arms=tuple(arms)), Console(file=text, width=width))
    assert all(name in text.getvalue() for name in (*names, "forwards)", "verifying")) and "…" not in text.getvalue()


def test_a_category_named_all_is_not_that_of_prompts_without_one(llm: LLM) -> None:
    tasks = [task(0, category="all"), task(1, category=""), task(2, category="")]
    result = bench(llm, tasks, replace(OPTIONS, rounds=1))
    assert {name: it.requests for name, it in result.plain.categories.items()} == {"all": 1, "": 2}
    rows = dict(table.tables(result))["speed-up by category"]
    assert rows[0] == ("gamma", "all", "(none)", "#MAT", "Overall")


def test_a_category_ends_no_cell_of_markdown() -> None:
    assert table.as_markdown((("a|b", "c\nd"), ("\\", "2"))) == "| a\\|b | c d |\n|---|---|\n| \\\\ | 2 |"
