"""Tuning: what is scored on paper is what generation does; the search, the advice, the command."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from foredraft import LLM, SamplingParams, profile
from foredraft.cli.app import app
from foredraft.cli.tune import why_none, write_profile
from foredraft.drafters.base import Drafter
from foredraft.drafters.model import ModelDrafter
from foredraft.drafters.ngram import NgramDrafter
from foredraft.drafters.registry import drafting
from foredraft.drafters.self_draft import SelfDrafter
from foredraft.drafters.several import Several
from foredraft.errors import RequestError
from foredraft.models.base import SkipSet
from foredraft.models.load import LoadOptions, load_model
from foredraft.stats import SpecStats
from foredraft.tuning import candidates as choosing
from foredraft.tuning import pipeline, report
from foredraft.tuning.acceptance import Acceptance, walk
from foredraft.tuning.calibration import CalibrationText, continue_prompts, pick_prompts, read_prompts
from foredraft.tuning.carousel import Carousel, Repeat, measure
from foredraft.tuning.confirm import Candidate, Confirmation, confirm
from foredraft.tuning.costs import Costs, StepCosts, Turn
from foredraft.tuning.driving import driven_by
from foredraft.tuning.forecast import Forecast
from foredraft.tuning.machine import Load
from foredraft.tuning.options import TuneOptions, Watcher
from foredraft.tuning.ranking import Advice, Row
from foredraft.tuning.score import Scorer
from foredraft.tuning.search import Evaluation, Limits, Search, Study, Trial, as_bits, skip_set

TOKENS = 40
SKIPS = (SkipSet((1,), ()), SkipSet((), (0,)), SkipSet((0,), (1,)), SkipSet((1,), (1,)))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny("llama"), "none", max_batch_size=4)


def text(llm: LLM, temperature: float = 0.0, count: int = 4, **changes: Any) -> CalibrationText:
    prompts = [[random.Random(i).randrange(VOCAB) for _ in range(3 + 5 * i)] for i in range(count)]
    params = SamplingParams(temperature=temperature, max_new_tokens=TOKENS, **changes)
    return continue_prompts(llm, prompts, params, seed=11)


def generated(llm: LLM, drafter: Drafter, calibration: CalibrationText, gamma: int) -> SpecStats:
    """What really happens, with the very texts that were scored."""
    stats = SpecStats()
    with driven_by(llm, drafter):
        for sample in calibration.samples:
            params = calibration.params_of(sample)
            result = llm.generate(list(sample.prompt), params, num_draft_tokens=gamma)
            assert tuple(result.token_ids) == sample.token_ids[sample.prompt_len :]
            stats.add(result.stats)
    return stats


def same(acceptance: Acceptance, stats: SpecStats, gamma: int, samples: int) -> None:
    """Every counter, position by position."""
    rounds = walk(acceptance, gamma, TOKENS)
    width = len(stats.drafted_at)
    assert list(rounds.drafted_at[:width]) == stats.drafted_at
    assert list(rounds.accepted_at[:width]) == stats.accepted_at
    assert not any(rounds.drafted_at[width:])
    assert rounds.passes == stats.target_passes - samples  # a sample's first token is the prompt's


# --- scoring is what generating does ---


@pytest.mark.parametrize("skip", SKIPS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_exact_score_of_a_skip_draft_is_what_generating_counts(llm: LLM, skip: SkipSet, temperature: float) -> None:
    calibration = text(llm, temperature)
    drafter = SelfDrafter(llm.model, "skip", None, skip)
    scorer = Scorer(llm.model, calibration)
    acceptance = scorer.score(drafter.model, depth=5, exact=True)
    scorer.close()
    for gamma in (1, 3, 5):
        same(acceptance, generated(llm, drafter, calibration, gamma), gamma, len(calibration.samples))


def test_exact_score_through_the_adapter_is_what_generating_counts() -> None:
    llm = LLM(tiny("gpt2"), "none", max_batch_size=4)
    calibration = text(llm)
    drafter = SelfDrafter(llm.model, "skip", None, SKIPS[0])
    scorer = Scorer(llm.model, calibration)
    acceptance = scorer.score(drafter.model, depth=4, exact=True)
    scorer.close()
    assert 0.02 < acceptance.alpha < 1
    same(acceptance, generated(llm, drafter, calibration, 4), 4, len(calibration.samples))


def test_one_pass_comes_close_to_the_exact_score(llm: LLM) -> None:
    calibration = text(llm, count=8)
    scorer = Scorer(llm.model, calibration)
    model = llm.model.variant(skip=SKIPS[0])
    exact, quick = scorer.score(model, depth=8, exact=True), scorer.score(model, depth=8)
    scorer.close()
    assert 0.1 < exact.alpha < 0.9
    assert quick.alpha == pytest.approx(exact.alpha, abs=0.05)
    assert walk(quick, 4).tokens_per_pass == pytest.approx(walk(exact, 4).tokens_per_pass, rel=0.05)


def test_a_self_draft_is_scored_on_the_targets_keys(llm: LLM) -> None:
    """A plain teacher-forced pass would give every row the draft's own keys: another model, another acceptance."""
    calibration = text(llm, count=8)
    scorer = Scorer(llm.model, calibration)
    model = llm.model.variant(skip=SkipSet((), (0,)))
    blocks = scorer.score(model, depth=1)
    plain = scorer.score(model, depth=TOKENS)
    scorer.close()
    assert blocks.runs != plain.runs


def test_scoring_leaves_the_cache_as_it_was_even_when_interrupted(llm: LLM) -> None:
    scorer = Scorer(llm.model, text(llm))
    before = [layer.clone() for layer in llm.model.cache.storage]
    scorer.score(llm.model.variant(skip=SKIPS[0]))
    model = llm.model.variant(skip=SKIPS[1])
    calls = iter(range(3))
    whole = model.forward

    def interrupted(rows: Any) -> torch.Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return whole(rows)

    model.forward = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        scorer.score(model, depth=4)
    assert all(torch.equal(a, b) for a, b in zip(before, llm.model.cache.storage, strict=True))
    scorer.close()


def test_score_of_an_unskipped_draft_is_perfect(llm: LLM) -> None:
    scorer = Scorer(llm.model, text(llm))
    acceptance = scorer.score(llm.model.variant())
    scorer.close()
    assert acceptance.alpha == 1.0
    assert walk(acceptance, 3, TOKENS).draft_acceptance_rate == 1.0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_score_of_a_draft_model_is_what_generating_counts(llm: LLM, temperature: float) -> None:
    calibration = text(llm, temperature)
    other = tiny("llama", seed=0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model = load_model(other, LoadOptions())
    scorer = Scorer(llm.model, calibration)
    acceptance = scorer.score_model(model)
    scorer.close()
    assert 0.05 < acceptance.alpha < 1
    for gamma in (2, 4):
        drafter = ModelDrafter(model, llm.model.vocab_size)
        same(acceptance, generated(llm, drafter, calibration, gamma), gamma, len(calibration.samples))


def test_score_of_lookup_is_what_generating_counts(llm: LLM) -> None:
    repeating = [[3, 4, 5, 6] * 4, [9, 8] * 6, list(range(20))]
    calibration = continue_prompts(llm, repeating, SamplingParams(max_new_tokens=TOKENS), seed=0)
    scorer = Scorer(llm.model, calibration)
    acceptance = scorer.score_drafter(NgramDrafter())
    scorer.close()
    for gamma in (1, 4):
        same(acceptance, generated(llm, NgramDrafter(), calibration, gamma), gamma, len(calibration.samples))


def test_alpha_is_the_overlap_of_distributions(llm: LLM) -> None:
    """Against whole distributions computed the plain way, one row at a time."""
    calibration = text(llm, 0.7, count=2)
    model = llm.model.variant(skip=SKIPS[0])
    scorer = Scorer(llm.model, calibration)
    acceptance = scorer.score(model, depth=1)
    total = 0.0
    for k, count in enumerate(scorer.counts):
        for offset in reversed(range(count)):
            p, q = (scorer._scores(m, {k: (offset, 1)}).softmax(-1) for m in (llm.model, model))
            total += float(torch.minimum(p, q).sum())
            with torch.inference_mode():
                scorer._restore()
    scorer.close()
    assert acceptance.alpha == pytest.approx(total / sum(scorer.counts), abs=1e-4)
    assert acceptance.alpha >= sum(r > 0 for row in acceptance.runs for r in row) / acceptance.positions - 0.1


# --- turns ---


def test_carousel_gives_everybody_their_turn(llm: LLM) -> None:
    skipping = SelfDrafter(llm.model, "skip", None, SKIPS[0])
    turns = [Turn("skip", skipping, 2), Turn("skip", skipping, 4), Turn("repeat", Repeat(), 3)]
    calibration = text(llm)
    before = llm.engine.drafter
    costs = measure(llm, calibration, turns, laps=6, max_seconds=20)
    assert llm.engine.drafter is before
    assert set(costs.drafts) == {"skip"}
    assert costs.steps.lengths[0] == 0 and costs.steps.step(0) > 0 and costs.steps.prefill > 0
    assert costs.drafts["skip"].seconds(3) > 0


def test_carousel_counts_no_prompt_as_a_step(llm: LLM) -> None:
    carousel = Carousel([Turn("plain", Repeat(), 0)])
    with driven_by(llm, carousel, carousel):
        llm.generate([1, 2, 3], SamplingParams(max_new_tokens=9))
    assert [tokens for tokens, _ in carousel.found.prefills] == [3]
    assert all(it.times.emitted == 1 for it in carousel.found.steps)


def test_carousel_notes_where_a_drafter_begins_to_read(llm: LLM) -> None:
    """And lets it draw whole chains at once, as it does where lengths are fixed."""
    drafter = ModelDrafter(load_model(tiny("llama"), LoadOptions()), VOCAB)
    carousel = Carousel([Turn("model", drafter, 2), Turn("model", drafter, 3)])
    with driven_by(llm, carousel, carousel):
        for _ in range(2):
            llm.generate([1, 2, 3], SamplingParams(max_new_tokens=30))
    assert [it.behind for it in carousel.found.starts] == [4, 4]
    assert all(it.behind == 0 for it in carousel.found.steps)
    assert carousel.rule([], 3).survivals == []


def test_choosing_among_several_has_its_price(llm: LLM) -> None:
    """Each step asks who is best, and drafts as many tokens as the turn says."""
    model = ModelDrafter(load_model(tiny("llama"), LoadOptions()), VOCAB)
    several = Several([NgramDrafter(), model])
    carousel = Carousel([Turn(several.name, several, 3)])
    with driven_by(llm, carousel, carousel):
        stats = llm.generate([1, 2, 3], SamplingParams(max_new_tokens=40)).stats
    assert {it.turn.name for it in carousel.found.steps} == {"ngram, model"}
    assert stats.drafted_at[2] > 0 and len(stats.drafted_at) == 3
    assert [*carousel.choice.candidates] == ["model"] and carousel.choice.picks == {}


# --- the search ---

LAYERS = 5
GOOD = SkipSet((1, 3), (2, 4))


def objective(skip: SkipSet) -> Evaluation:
    """Peaks at GOOD: every difference costs, more so beside each other."""
    wanted, got = as_bits(GOOD, LAYERS), as_bits(skip, LAYERS)
    off = sum(a != b for a, b in zip(wanted, got, strict=True))
    speedup = 2.0 - 0.2 * off - 0.05 * off**2
    return Evaluation(1 / (1 + off), Forecast(3, speedup, (1.0, speedup), 2.0, 0.5))


def search(limits: Limits, path: Path | None = None, **changes: Any) -> tuple[Search, list[Trial]]:
    made = Search(Study(LAYERS, "skip", path, "a model"), changes.pop("objective", objective), limits, **changes)
    return made, made.run()


def test_search_finds_the_best_set_and_repeats_itself() -> None:
    _, first = search(Limits(90, 60, seed=3))
    _, again = search(Limits(90, 60, seed=3))
    assert first[0].skip == GOOD
    assert first == again
    assert len({trial.skip for trial in first}) == 90


def test_search_beats_random_sets_of_the_same_size() -> None:
    _, found = search(Limits(60, 60, seed=1))
    size, source = len(found[0].skip), random.Random(0)
    sets = [source.sample(range(2 * LAYERS), size) for _ in range(200)]
    best = max(objective(skip_set(tuple(i in chosen for i in range(2 * LAYERS)))).forecast.speedup for chosen in sets)
    assert found[0].speedup >= best


def test_search_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    calls: list[SkipSet] = []

    def stopping(skip: SkipSet) -> Evaluation:
        if len(calls) == 17:
            raise KeyboardInterrupt
        calls.append(skip)
        return objective(skip)

    interrupted, found = search(Limits(60, 60), path, objective=stopping)
    assert interrupted.interrupted and len(found) == 17
    seen: list[Trial] = []
    resumed, rest = search(Limits(60, 60), path, observer=lambda trial, best: seen.append(trial))
    assert not resumed.interrupted and len(rest) == 60 and len(seen) == 43
    assert not {trial.skip for trial in seen} & set(calls)
    assert rest[0].skip == GOOD
    assert Study(LAYERS, "skip", path, "a model").ranked() == rest


def test_search_keeps_to_its_time_and_starts_where_told(tmp_path: Path) -> None:
    assert search(Limits(60, 0))[1] == []
    _, found = search(Limits(1, 60), starts=[GOOD])
    assert [trial.skip for trial in found] == [GOOD]


def test_search_ends_when_all_sets_are_known() -> None:
    made = Search(Study(1), lambda skip: Evaluation(0.5, Forecast(1, 1.0, (1.0, 1.0), 1.0, 0.5)), Limits(100, 60))
    assert {trial.skip for trial in made.run()} == {SkipSet((0,), ()), SkipSet((), (0,))}


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    Study(LAYERS, "skip", path, "a model")
    with pytest.raises(RequestError, match=r"study of a model, not of another; give another path"):
        Study(LAYERS, "skip", path, "another")
    path.write_text("not a database" * 100)
    with pytest.raises(RequestError, match="no study that can be read"):
        Study(LAYERS, "skip", path, "a model")


# --- calibration text ---


def test_prompts_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffFirst passage\nof two lines.\n\nSecond.\n\n\n")
    (tmp_path / "b.jsonl").write_text('{"turns": ["Hello", "no"]}\n\n"Plain"\n{"question": "Why?", "answer": "x"}\n')
    (tmp_path / "c.bin").write_bytes(b"\xff")
    found = [getattr(prompt, "text", prompt) for prompt in read_prompts(tmp_path)]
    assert found == ["First passage\nof two lines.", "Second.", "Hello", "Plain", "Why?"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "does not exist"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"answer": 3}\n', "line 2 has no prompt"),
        ("bad.jsonl", b"{", "line 1 has no prompt"),
        ("bad.txt", b"\xff\xfe", "cannot be read"),
        ("bad.txt.gz", b"no gzip", "cannot be read"),
    ],
)
def test_bad_calibration_text_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        list(read_prompts(tmp_path / name))


def test_held_out_prompts_are_others(llm: LLM) -> None:
    prompts = pick_prompts(llm, None, 4, 2, seed=5)
    assert (len(prompts.calibration), len(prompts.held_out)) == (4, 2)
    assert len({*prompts.calibration, *prompts.held_out}) == 6
    assert prompts == pick_prompts(llm, None, 4, 2, seed=5)
    assert prompts != pick_prompts(llm, None, 4, 2, seed=6)


def test_fingerprint_tells_texts_apart(llm: LLM) -> None:
    assert text(llm).fingerprint == text(llm).fingerprint
    assert text(llm).fingerprint != text(llm, 0.5).fingerprint


# --- confirmation, advice ---


def ticking(seconds: Iterable[float]) -> Callable[[], float]:
    """A clock that moves on by the next of `seconds` (the last one for ever) with every second reading."""
    source, now, reading = iter(seconds), 0.0, 0
    last = 0.0

    def clock() -> float:
        nonlocal now, reading, last
        reading += 1
        if reading % 2 == 0:
            last = next(source, last)
            now += last
        return now

    return clock


def confirmed(llm: LLM, seconds: Iterable[float], rounds: int = 2) -> tuple[dict[str, Confirmation], int]:
    candidates = {
        "skip": Candidate(SelfDrafter(llm.model, "skip", None, SKIPS[0]), 3),
        "ngram": Candidate(NgramDrafter(), 4),
    }
    ticks: list[int] = []
    prompts, params = [[1, 2, 3], [7, 8]], SamplingParams(max_new_tokens=12)
    clock = ticking(seconds)
    found = confirm(llm, candidates, prompts, params, rounds=rounds, tick=lambda: ticks.append(1), clock=clock)
    return found, len(ticks) // len(prompts)


def test_confirm_counts_and_compares(llm: LLM) -> None:
    found, rounds = confirmed(llm, [1.0])
    assert rounds == 2
    for measured in found.values():
        assert measured.equal and measured.low == measured.speedup == measured.high == 1
        assert (measured.rounds, measured.error) == (2, 0)
        assert measured.stats.output_tokens == 24
    assert found["skip"].stats.drafted > 0


def test_confirm_goes_on_while_rounds_scatter_but_not_for_ever(llm: LLM) -> None:
    source = random.Random(0)
    found, rounds = confirmed(llm, (source.uniform(0.1, 2) for _ in range(10_000)))
    assert rounds == 6 and all(measured.rounds == 6 for measured in found.values())
    assert found["skip"].low < found["skip"].speedup < found["skip"].high and found["skip"].error > 0.05
    calm = [1.0] * 3 + [source.uniform(0.5, 2) for _ in range(6)]  # the first prompt's runs, and then nothing happens
    found, rounds = confirmed(llm, [*calm, *[1.0] * 90], rounds=3)
    assert 3 <= rounds < 9 and found["skip"].error <= 0.05


def row(name: str, predicted: float, measured: float | None = None, memory: int = 0) -> Row:
    seen = None if measured is None else Confirmation(measured, measured, measured, 1.0, True, SpecStats())
    return Row(name, 0.5, 0.1, Forecast(2, predicted, (1.0, predicted), 1.5, 0.5), memory, None, seen)


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([row("a", 1.5, 1.1), row("b", 1.2, 1.3)], "b"),  # what was measured counts
        ([row("a", 1.5), row("b", 1.2)], "a"),  # or what was predicted
        ([row("a", 1.5, 1.30, memory=9), row("b", 1.2, 1.29)], "b"),  # as good as equal: the smaller one
        ([row("a", 1.5, 1.0), row("b", 1.2, 0.9)], None),
        ([], None),
    ],
)
def test_recommendation(rows: list[Row], best: str | None) -> None:
    costs = Costs(StepCosts((0,), (1.0,)))
    advice = Advice("m", tuple(rows), {}, costs, {}, None, TuneOptions(), (1, 1))
    assert (advice.recommended and advice.recommended.name) == best
    assert any((best or "plain decoding") in line for line in report.lines(advice))


def advice_of(*rows: Row, load: Load = Load(), found: profile.Profile | None = None) -> Advice:  # noqa: B008
    costs = Costs(StepCosts((0,), (1.0,)), load=load)
    return Advice("m", rows, {}, costs, {}, found, TuneOptions(), (1, 1))


def skipping(predicted: float, measured: float | None) -> Row:
    return replace(row("skip", predicted, measured), skip=SkipSet((1,), ()))


PROFILE = profile.Profile("llama", "0" * 16, 2, SkipSet((1,), ()), {"skip": profile.ProfileFigures(0.8, 0.5, 3, 1.4)})
DOUBTS = [
    (skipping(1.46, 1.46), Load(), False),
    (skipping(1.4, 1.15), Load(), False),
    (skipping(0.85, 1.46), Load(), True),  # what a busy machine once said, and what came of it
    (skipping(1.5, 1.1), Load(), True),
    (skipping(1.4, 1.4), Load(0.9, 0.5), False),  # busy all the while, and yet they agree
    (skipping(1.4, None), Load(0.9, 0.5), True),
    (skipping(1.4, None), Load(), False),
]


@pytest.mark.parametrize(("skip", "load", "doubtful"), DOUBTS)
def test_a_doubtful_profile_is_kept_only_when_told_to(
    skip: Row, load: Load, doubtful: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREDRAFT_CACHE", str(tmp_path))
    advice = advice_of(skip, load=load, found=PROFILE)
    assert (advice.doubt is not None) is doubtful
    assert (write_profile(advice, None, anyway=False) is None) is doubtful
    assert (write_profile(advice, tmp_path / "own.json", anyway=False) is None) is doubtful
    assert doubtful == ("--save-anyway" in why_none(advice))
    assert write_profile(advice, tmp_path / "own.json", anyway=True) == tmp_path / "own.json"
    assert advice.as_dict()["doubt"] == advice.doubt


def test_table_and_json_say_what_speaks_against_them() -> None:
    calm = advice_of(row("a", 1.4, 1.5))
    assert not any("WARNING" in line for line in report.lines(calm))
    loud = replace(row("b", 0.85, 2.44), cost_error=0.31)
    busy = advice_of(row("a", 1.4, 1.5), loud, load=Load(0.48, 0.2))
    said = "\n".join(report.lines(busy))
    assert "machine was busy while costs were measured: other processes took 48% of its processors" in said
    assert "b: prediction and measurement are more than a quarter apart" in said
    assert "costs still scatter after 3 more measurements: b 31%" in said
    told = busy.as_dict()
    assert told["busy"] and told["load"]["costs"] == {"busy": True, "others": 0.48, "waited": 0.2}
    assert [(it["disagrees"], it["cost_error"]) for it in told["rows"]] == [(False, 0.0), (True, 0.31)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": 0}, "prompts=0"),
        ({"tokens": 1}, "tokens=1"),
        ({"trials": -1}, "trials=-1"),
        ({"max_seconds": -1.0}, "max_seconds=-1.0"),
        ({"without": ("int5",)}, "without='int5'"),
    ],
)
def test_bad_options_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TuneOptions(**values)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Costs from a glance, and a profile folder of our own."""
    monkeypatch.setattr(pipeline, "COST_LAPS", 1)
    monkeypatch.setattr(choosing, "GAMMAS", (2,))
    monkeypatch.setenv("FOREDRAFT_CACHE", str(tmp_path / "cache"))
    yield tmp_path


OPTIONS = TuneOptions(trials=8, max_seconds=20, prompts=2, tokens=16, rounds=1)


def test_advice_covers_every_drafter(llm: LLM, brief: Path) -> None:
    stages: list[str] = []
    advice = pipeline.advise(llm, OPTIONS, name="tiny", watcher=Watcher(lambda stage, total: stages.append(stage)))
    assert {row.name for row in advice.rows} == set(drafting())
    assert all(row.measured and row.measured.equal for row in advice.rows)
    memory = {row.name: row.memory for row in advice.rows}
    assert memory["skip"] == memory["ngram"] == 0 < memory["int4+skip"] <= memory["int4"]
    assert stages[-1] == "confirming" and "searching int4+skip" in stages
    assert llm.engine.drafter.name == "none"
    assert advice.profile is not None
    profile.save(advice.profile)
    found = profile.find(llm.model)
    assert found == advice.profile
    report.plot(advice, brief / "plot.png")
    assert (brief / "plot.png").stat().st_size > 10_000
    json.dumps(advice.as_dict())


def test_interrupted_confirmation_keeps_predictions(llm: LLM, brief: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "confirm", interrupt)
    advice = pipeline.advise(llm, replace(OPTIONS, without=("int4", "int8", "int4+skip")))
    assert [row.measured for row in advice.rows] == [None] * 3
    assert advice.profile is not None


# --- the command ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny("llama").save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["tune", *args], prog_name="foredraft", catch_exceptions=False)


def test_tune_end_to_end(checkpoint: Path, brief: Path) -> None:
    (brief / "prompts.jsonl").write_text("\n".join(json.dumps(f"w{i} w{i + 1} w{i + 5}") for i in range(9)))
    out, study, picture = brief / "profile.json", brief / "study.db", brief / "plot.svg"
    flags = ["--model", str(checkpoint), "--calibration", str(brief / "prompts.jsonl"), "--trials", "5"]
    flags += ["--max_seconds", "20", "--prompts", "2", "--tokens", "12", "--rounds", "1", "--study", str(study)]
    flags += ["--draft", str(checkpoint), "--out", str(out), "--save-anyway", "--plot", str(picture), "--json"]
    done = run(*flags)
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    rows = {row["name"]: row for row in answer["rows"]}
    assert set(rows) == {*drafting(), str(checkpoint)}
    assert rows[str(checkpoint)]["alpha"] > 0.1  # itself, in four bits, of random weights
    assert answer["trials"] == {"skip": 5, "int4+skip": 5}
    assert (answer["calibration_prompts"], answer["held_out_prompts"]) == (4, 2)
    assert answer["profile"] == str(out) and picture.exists()
    llm = LLM(checkpoint, "none")
    profile.load(out).check(llm.model)
    again = run(*flags, "--without", "int8", "--without", "int4+skip")  # goes on with the study: nothing left to try
    assert json.loads(again.stdout)["trials"] == {"skip": 5}


def test_tune_prints_a_table(checkpoint: Path, brief: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    done = run("--model", str(checkpoint), "--trials", "0", "--prompts", "1", "--tokens", "8", "--rounds", "1")
    assert done.exit_code == 0, done.stderr
    assert "predicted" in done.stdout and "int8" in done.stdout and "recommended: " in done.stdout
    assert "skip" not in done.stdout
    assert "no skip profile" in done.stderr


def test_missing_extra_is_named(checkpoint: Path, brief: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    done = run("--model", str(checkpoint))
    assert done.exit_code == 1
    assert "pip install 'foredraft[tune]'" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--prompts", "0"], "prompts=0"), (["--without", "x"], "without='x'"), (["--temperature", "-1"], "temperature")],
)
def test_wrong_flags_cost_no_loading(flags: list[str], message: str) -> None:
    done = run("--model", "/nowhere", *flags)
    assert done.exit_code == 2
    assert message in done.stderr
