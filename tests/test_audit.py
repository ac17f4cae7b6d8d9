"""The audit: it passes where all is sound, every planted bug is caught, and what fails is told in its smallest form."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny
from scipy import stats
from typer.testing import CliRunner

import foredraft.engine
from foredraft import LLM, SamplingParams
from foredraft.audit import Audit, AuditOptions, audit, casefile, distribution, shrink
from foredraft.audit.asks import DECIDED, FORMS, SETTINGS, Ask, asks, derived, far, is_far, ordered
from foredraft.audit.controls import CONTROLS
from foredraft.audit.distribution import chi_square, make_tree, telling_tree
from foredraft.audit.exact import Case, Compared, compare_run, first_difference, grid, reference
from foredraft.audit.pipeline import CONTROL_LENGTH, Run
from foredraft.audit.play import PLAIN, Outcome, Subject, play
from foredraft.audit.scripted import Sketch
from foredraft.audit.subjects import Audited, find
from foredraft.audit.table import show
from foredraft.cli.app import app
from foredraft.cli.audit import AuditFlags, audit_options, command
from foredraft.cli.console import stdout_console
from foredraft.drafters.ngram import NgramDrafter
from foredraft.errors import ModelError, RequestError
from foredraft.models.load import LoadOptions
from foredraft.steering import Stateful
from foredraft.tuning.options import Watcher
from foredraft.types import TokenLogprobs
from foredraft.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")
BRIEF = AuditOptions((3,), (3,), ("leaving",), 3, 20, 500)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny("llama"), "none", max_batch_size=4)


@pytest.fixture(scope="module")
def bundled() -> LLM:
    return LLM(draft="none")


def ngram() -> Audited:
    return Audited("ngram", "ngram", NgramDrafter())


@pytest.fixture(scope="module")
def found(bundled: LLM) -> Audit:
    """Every drafter that the bundled pair has, and every control."""
    audited, left_out = find(bundled, [], LoadOptions(), bundled=True)
    return audit(bundled, audited, BRIEF, name="the bundled target", left_out=left_out)


def test_all_drafters_of_the_bundled_pair_pass(found: Audit) -> None:
    assert [it.drafter for it in found.checked] == [
        "ngram", "suffix", "int4", "int8", "skip", "int4+skip", "model", "auto",
    ]  # fmt: skip
    assert found.left_out == {}
    for it in found.checked:
        assert it.passed and it.compared.differences == [] and it.compared.tokens > 50, it.drafter
        refused = it.compared.drafted - it.compared.accepted
        assert refused > 0 or it.drafter in ("ngram", "int8"), it.drafter  # so the rewind was seen
        assert it.tested and it.tested.p_value >= it.tested.threshold == BRIEF.alarm / 8


def test_every_planted_bug_is_caught(found: Audit) -> None:
    assert len(found.controls) == len(CONTROLS) >= 12
    assert [it.name for it in found.controls if it.caught is not True] == []
    assert found.status == "passed" and len(found.guarantees) == 2


def test_the_certificate_names_hashes_and_no_paths(found: Audit) -> None:
    text = json.dumps(found.as_dict())
    assert str(Path.home()) not in text and "/work" not in text
    read = json.loads(text)
    assert read["status"] == "passed" and len(read["setting"]["model_hash"]) == 16
    assert [it["model_hash"] != "" for it in read["drafters"]] == [
        it["drafter"] in ("model", "auto") for it in read["drafters"]
    ]
    assert set(read["setting"]["versions"]) == {"foredraft", "torch", "transformers", "python"}


def test_the_tables_have_every_drafter_and_control(found: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    show(found, stdout_console(width=200), "foredraft audit")
    shown = capsys.readouterr().out
    assert all(it.drafter in shown for it in found.checked) and all(it.name in shown for it in found.controls)
    assert f"PASSED: {len(CONTROLS)} of {len(CONTROLS)} planted bugs caught" in shown and "bit for bit" in shown


def test_a_distribution_without_drafts_is_no_evidence(found: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    """Lookups found nothing in so short a text, had a p like everybody else, and the audit passed without a word."""
    ngram = next(it for it in found.checked if it.drafter == "ngram")
    assert ngram.tested and ngram.tested.telling and ngram.state == "equal"  # on a prompt that repeats itself
    idle = replace(ngram, tested=replace(ngram.tested, drafted=0, accepted=0))
    certain = replace(ngram, drafter="sure", tested=replace(ngram.tested, accepted=ngram.tested.drafted))
    alone = replace(found, checked=(idle,))
    assert alone.status == "rejection not tried" and alone.guarantees == ()
    untold = replace(found, checked=(idle, certain))
    assert untold.status == "passed" and "was not shown" in untold.guarantees[1]
    some = replace(found, checked=(idle, replace(ngram, drafter="other")))
    assert "draws from the target's distribution with other (" in some.guarantees[1]
    told = some.as_dict()["drafters"]
    assert [it["status"] for it in told] == ["equal; rejection sampling not shown (no drafts)", "equal"]
    show(untold, stdout_console(width=200), "foredraft audit")
    shown = capsys.readouterr().out
    assert "no difference; rejection sampling not shown of ngram (no drafts), sure (all accepted)" in shown
    show(alone, stdout_console(width=200), "foredraft audit")
    assert "nothing was drafted under rejection sampling" in capsys.readouterr().out


def test_controls_meet_every_setting_however_many_prompts_there_are(bundled: LLM) -> None:
    """With the eight prompts of a whole audit those with a grammar were left out, and its control was missed."""
    run = Run(bundled, replace(BRIEF, prompts=8, tokens=8), Watcher())
    run.prepare()
    short = {ask.setting for ask in run.asks if not is_far(ask)}
    assert {ask.setting for ask in run._crowd(CONTROLS[0])} == short >= {"greedy, stop", *FORMS}
    for control in CONTROLS:
        if control.needs == "grammar":
            assert run._planted(control).caught, control.name


def test_without_controls_nothing_passes(found: Audit) -> None:
    assert replace(found, controls=()).status == "controls missed"
    missed = (*found.controls[1:], replace(found.controls[0], caught=False))
    assert replace(found, controls=missed).status == "controls missed"
    assert replace(found, complete=False).status == "interrupted"
    assert replace(found, controls=()).guarantees == ()
    idle = replace(found.checked[0], compared=replace(found.checked[0].compared, drafted=0))
    assert replace(found, checked=(idle,)).status == "nothing drafted"
    unlikely = replace(found.checked[0], tested=replace(found.checked[0].tested, p_value=1e-9))  # type: ignore[type-var]
    assert replace(found, checked=(unlikely,)).status == "failed"


def test_models_without_a_tokenizer_are_audited_without_a_grammar(llm: LLM) -> None:
    audited, _ = find(llm, ["int4"], LoadOptions(), bundled=False)
    found = audit(llm, audited, BRIEF)
    assert found.status == "passed"
    missing = {it.name for it in CONTROLS if it.needs or (it.far and llm.max_model_len < 600)}
    assert {it.name for it in found.controls if it.caught is None} == missing != set()


def test_a_third_party_model_passes(shared: Path) -> None:
    llm = LLM(shared / "models" / "stories3M", "none")
    audited, _ = find(llm, ["suffix", "int8"], LoadOptions(), bundled=False)
    assert audit(llm, audited, BRIEF).status == "passed"


# What fails


def one_too_many(draft, logits, request):  # type: ignore[no-untyped-def]
    """The first bug that everyone has had."""
    verdict = verify(draft, logits, request)
    return replace(verdict, accepted=tuple(range(min(len(verdict.accepted) + 1, len(draft)))))


def test_a_bug_in_the_installed_copy_fails_with_a_command(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audited, _ = find(llm, ["int4"], LoadOptions(), bundled=False)
    with monkeypatch.context() as patched:
        patched.setattr(foredraft.engine, "verify", one_too_many)
        found = audit(llm, audited, BRIEF)
        assert found.status == "failed" and found.failure
        case = casefile.loads(found.failure.case)
        assert (len(case.asks), case.batch) == (1, 1) and case.ask.num_draft_tokens in (1, 2, 3)
        assert len(case.ask.prompt) < 17 and case.ask.params.max_new_tokens <= BRIEF.tokens
        assert shrink.replay(llm, Subject(audited[0].drafter), case)
    assert shrink.replay(llm, Subject(audited[0].drafter), case) is None  # the bug has gone
    show(found, stdout_console(width=100), "foredraft audit --model here")
    shown = capsys.readouterr().out
    assert "foredraft audit --model here --draft int4 --case '{" in shown and "FAILED: drafting changes" in shown
    assert "are not the target's distribution" in shown
    assert "foredraft audit --model here --draft int4 --seed 0 --quick" in shown


def test_an_interrupt_keeps_what_was_compared(llm: LLM) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    found = audit(llm, [ngram()], BRIEF, watcher=Watcher(tick=interrupt))
    assert found.status == "interrupted" and found.guarantees == () and not found.checked[0].complete
    assert llm.generate([1, 2, 3], SamplingParams(max_new_tokens=2)).finish_reason == "length"  # usable afterwards


TRUTH = Outcome(
    (5, 6),
    (b"a", b"b"),
    (TokenLogprobs(5, -1.0), TokenLogprobs(6, -2.0)),
    "length",
    "",
    0,
    0,
    True,
    (False, True),
    ((5, False), (6, True)),
    "ab",
    "ab",
)
ONE = {"tokens": (5,), "notes": (b"a",), "flags": (False,), "handed": ((5, False),), "text": "a", "result": "a"}
LEFT = replace(TRUTH, reason="abort", **ONE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "what", "position"),
    [
        ({"tokens": (5, 7)}, "tokens", 1),
        ({"notes": (b"a", b"c")}, "logits", 1),
        ({"notes": (None, b"b")}, "logits", 0),
        ({"logprobs": (TokenLogprobs(5, 0.0), TokenLogprobs(6, -2.0))}, "logprobs", 0),
        ({"tokens": (5, 6, 7), "notes": (b"a", b"b", b"c")}, "end", 2),
        ({"tokens": (5,), "notes": (b"a",)}, "end", 1),
        ({"reason": "stop"}, "end", 2),
        ({"error": "ValueError: no"}, "error", 2),
        ({"counted": False}, "counts", 2),
        ({"handed": ((5, False),)}, "steps", 1),
        ({"handed": ((5, False), (6, False))}, "steps", 1),
        ({"handed": ((5, False), (None, True))}, "steps", 1),
        ({"text": "axb"}, "text", 2),
        ({"text": "a"}, "text", 2),
        ({"result": "abc"}, "text", 2),
    ],
)
def test_whatever_differs_is_a_difference(changed: dict[str, Any], what: str, position: int) -> None:
    case = Case((Ask((1,), SamplingParams(seed=0)),), 1, 0)
    assert first_difference(TRUTH, TRUTH, case) is None
    difference = first_difference(TRUTH, replace(TRUTH, **changed), case)
    assert difference and (difference.what, difference.position) == (what, position)


def test_who_leaves_early_agrees_as_far_as_he_came() -> None:
    left = Case((Ask((1,), SamplingParams(seed=0), leaves=1),), 1, 0)
    assert first_difference(TRUTH, LEFT, left) is None
    for changed in ({"tokens": (6,)}, {"handed": ()}, {"text": "x"}, {"text": "abc", "result": "abc"}):
        assert first_difference(TRUTH, replace(LEFT, **changed), left)  # type: ignore[arg-type]


class Fails:
    """A processor that raises once there are so many tokens, as one's own may: the same with and without drafts."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= self.tokens:
            raise ValueError("too long")
        return scores


def test_requests_that_fail_either_way_are_not_compared(
    llm: LLM, found: Audit, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that both arms share counted as equality."""
    run = Run(llm, replace(BRIEF, own=(SamplingParams(processors=(Fails(9),)),)), Watcher())
    run.prepare()
    run.check(ngram())
    found = replace(found, checked=tuple(run.checked))
    compared = found.checked[0].compared
    assert compared.differences == [] and compared.unproven == ["yours 1"] and "too long" in compared.error
    assert compared.uncompared == compared.failing["yours 1"] > 0
    assert found.status == "not compared" and found.guarantees == () and not found.checked[0].passed
    told = found.as_dict()["drafters"][0]["compared"]
    assert told["not_compared"] == compared.uncompared and told["unproven"] == ["yours 1"]
    show(found, stdout_console(width=200), "foredraft audit")
    shown = capsys.readouterr().out
    assert "fail with and without drafts (ValueError: too long)" in shown and "too many in: yours 1" in shown
    assert "FAILED: too many requests fail" in shown


def test_a_few_that_fail_either_way_do_not_spoil_the_rest() -> None:
    found = Compared(asked=Counter(a=20, b=20), failing=Counter(a=2, b=3))
    assert found.uncompared == 5 and found.unproven == ["b"]


def test_tokens_before_a_common_error_are_compared(llm: LLM) -> None:
    failing = replace(TRUTH, error="ValueError: no", reason="error")
    case = Case((Ask((1,), SamplingParams(seed=0)),), 1, 0)
    assert first_difference(failing, failing, case) is None
    difference = first_difference(failing, replace(failing, tokens=(5, 7)), case)
    assert difference and difference.what == "tokens"
    gone = Case((Ask((1,), SamplingParams(seed=0), leaves=1),), 1, 0)  # before it could fail
    assert first_difference(failing, LEFT, gone) is None
    found = Compared()
    asked = [Ask((1, 2), SamplingParams(seed=0, max_new_tokens=4, processors=(Fails(4),)), "mine", 2)]
    compare_run(llm, Subject(NgramDrafter()), asked, 1, reference(llm, asked), found)
    assert found.tokens == 2 and found.failing == {"mine": 1}


# What it asks


def test_prompts_reach_behind_512_and_1024_where_there_is_room(llm: LLM, bundled: LLM) -> None:
    deep: Any = SimpleNamespace(max_model_len=2048, model=llm.model)
    assert [len(prompt) for prompt in far(deep, AuditOptions())] == [507, 1100]
    assert [len(prompt) for prompt in far(deep, AuditOptions.quick())] == [507]
    assert [len(prompt) for prompt in far(bundled, AuditOptions())] == [507, 960]  # a context of 1,024
    for options in (AuditOptions(), AuditOptions.quick()):  # whose texts cross 512
        assert 507 < 512 < 507 + min(ask.params.max_new_tokens for ask in asks(bundled, options) if is_far(ask))


def test_every_setting_shows_what_was_written_into_logits() -> None:
    assert {params.logprobs for params in (*SETTINGS.values(), *DECIDED.values(), *FORMS.values())} == {2}


def test_requests_are_ragged_and_have_seeds_of_their_own(llm: LLM) -> None:
    made = asks(llm, AuditOptions())
    kinds = len(SETTINGS) + len(DECIDED)
    assert len({ask.seed for ask in made}) == len(made) == 8 * kinds + 2 * len(far(llm, AuditOptions()))
    assert max(ask.seed for ask in made) > 2**62
    assert max(len(ask.prompt) for ask in made) > 256  # beyond a chunk's border
    assert len({ask.params.max_new_tokens for ask in made}) == 4
    crowd = ordered(made, "leaving", 3, 0)
    assert sorted(ask.seed for ask in crowd) == sorted(ask.seed for ask in made)
    assert any(ask.leaves for ask in crowd) and any(ask.arrives for ask in crowd)
    assert {ask.num_draft_tokens for ask in crowd} == {3}


def test_drafts_wider_than_what_is_exact_are_left_out() -> None:
    assert {length for length, _, _ in grid(AuditOptions(), 4)} == {1, 2, 4, None}
    assert 40 in {length for length, _, _ in grid(AuditOptions(), 128)}
    assert [order for _, batch, order in grid(AuditOptions(), 4) if batch == 1] == ["together"] * 4


def test_every_kind_of_setting_is_asked(bundled: LLM) -> None:
    run = Run(bundled, replace(BRIEF, prompts=4), Watcher())
    run.prepare()
    kinds = {ask.setting: ask.params for ask in run.asks}
    assert kinds["greedy, bias"].logit_bias and kinds["greedy, stop"].stop_token_ids
    assert kinds["sampled, min_p, state"].min_p and isinstance(kinds["sampled, min_p, state"].processors[0], Stateful)
    stopped = [ask for ask in run.asks if ask.setting == "greedy, stop text"]
    assert stopped and all(run.truth[ask.seed].reason == "stop" for ask in stopped)
    assert len({ask.seed for ask in run.asks}) == len(run.asks)
    biased = next(ask for ask in run.asks if ask.setting == "greedy, bias")
    whole = next(ask for ask in run.asks if (ask.prompt, ask.setting) == (biased.prompt, "greedy"))
    assert run.truth[biased.seed].tokens != run.truth[whole.seed].tokens


def test_a_stop_is_within_a_drafts_tokens(llm: LLM) -> None:
    """At the end of a draft a bug that sees ends late went unnoticed, and the audit failed for it."""
    ask = Ask((1,), SamplingParams(seed=0), "greedy")
    for count in range(5, 40):
        output = [7, *range(20, 19 + count)]
        output[1] = output[3]  # one that comes twice
        (made,) = derived(llm, [ask], {0: output})
        (token,) = made.params.stop_token_ids
        assert output.index(token) % (CONTROL_LENGTH + 1) != 0 and output.count(token) == 1


def test_a_list_of_drafters_is_audited_as_one(bundled: LLM) -> None:
    (listed,), _ = find(bundled, ["suffix,model"], LoadOptions(), bundled=True)
    assert [*listed.drafter.drafters] == ["suffix", "model"]  # type: ignore[attr-defined]
    found = Compared()
    asked = asks(bundled, BRIEF)[:2]
    crowd = [replace(ask, num_draft_tokens=None) for ask in asked]
    compare_run(bundled, Subject(listed.drafter), crowd, 2, reference(bundled, asked), found)
    assert found.drafted > 0 and found.differences == []


def test_settings_of_ones_own_are_audited(llm: LLM) -> None:
    own = SamplingParams(temperature=0.3, min_p=0.1)
    made = asks(llm, replace(BRIEF, own=(own,)))
    assert {ask.params.min_p for ask in made if ask.setting == "yours 1"} == {0.1}


def test_a_case_survives_being_printed(llm: LLM) -> None:
    made = tuple(replace(ask, arrives=i, leaves=3 if i else None) for i, ask in enumerate(asks(llm, BRIEF)))
    case = Case(made, 3, 2)
    read = casefile.loads(casefile.dumps(case))
    stripped = [replace(ask, params=replace(ask.params, processors=())) for ask in (*case.asks, *read.asks)]
    assert stripped[: len(made)] == stripped[len(made) :] and (read.batch, read.index) == (3, 2)
    truth, again = (play(llm, PLAIN, it.asks, 3) for it in (case, read))
    assert [it.tokens for it in truth] == [it.tokens for it in again]  # processors included


def test_biases_and_processors_of_ones_own_come_back(llm: LLM) -> None:
    own = SamplingParams(seed=0, logit_bias={3: -float("inf"), 4: 1.5}, processors=(Fails(4),))
    text = casefile.dumps(Case((Ask((1, 2), own, "yours 1", 2),), 1, 0))
    (read,) = casefile.loads(text, own.processors).asks
    assert read.params == own
    assert casefile.loads(text).asks[0].params.processors == ()


def test_the_tree_has_every_continuation(llm: LLM) -> None:
    tree = make_tree(llm, (1, 2, 3))
    assert len(tree.continuations) == 81 and sum(tree.continuations.values()) == pytest.approx(1)
    (plain,) = play(llm, PLAIN, [Ask((1, 2, 3), SamplingParams(max_new_tokens=1, seed=0))], 1, torch.Tensor.clone)
    assert max(tree.following[()], key=tree.following[()].__getitem__) == plain.tokens[0]


def test_a_drafter_is_tested_where_its_tokens_are_accepted_and_refused(llm: LLM) -> None:
    """On the other prompt all of its first tokens are refused, and no second one is ever tried."""
    trees = [make_tree(llm, prompt) for prompt in ((1, 2, 3), (4, 5, 6, 7))]
    subject = Subject(Sketch(trees[1], llm.model.vocab_size), "fixed")
    assert telling_tree(llm, subject, BRIEF.seed, trees) is trees[1]
    assert telling_tree(llm, subject, BRIEF.seed, reversed(trees)) is trees[1]  # the first one will do
    assert distribution.test(llm, subject, trees[1], BRIEF, 1e-6).telling
    assert not distribution.test(llm, subject, trees[0], BRIEF, 1e-6).telling


def test_chi_square_is_scipys() -> None:
    source = random.Random(0)
    chances = {(i,): chance for i, chance in enumerate((0.4, 0.3, 0.2, 0.1))}
    seen = Counter((i,) for i in source.choices(range(4), (0.4, 0.3, 0.2, 0.1), k=500))
    expected = stats.chisquare([seen[path] for path in chances], [500 * chance for chance in chances.values()]).pvalue
    assert chi_square(seen, chances) == (pytest.approx(expected), 4)
    assert chi_square(seen + Counter({(9,): 1}), chances)[0] == 0.0  # impossible
    rare = {(0,): 0.999, (1,): 0.0005, (2,): 0.0005}
    assert chi_square(Counter({(0,): 499, (1,): 1}), rare)[1] == 2  # the rare ones share a cell


def test_references_are_plain(llm: LLM) -> None:
    made = asks(llm, BRIEF)[:2]
    truth = reference(llm, [replace(ask, num_draft_tokens=4, arrives=3, leaves=1) for ask in made])
    assert all(outcome.drafted == 0 and len(outcome.tokens) >= 9 for outcome in truth.values())


# Bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": 1}, "prompts=1 is not usable"),
        ({"samples": 10}, "samples=10 is not usable"),
        ({"alarm": 0.0}, "alarm=0.0 is not usable"),
        ({"lengths": (0,)}, r"lengths=\(0,\) is not usable"),
        ({"batches": ()}, r"batches=\(\) is not usable"),
        ({"orders": ("sideways",)}, "choose from together, staggered, leaving"),
        ({"own": (SamplingParams(temperature=1.0, verifier="rejection"),)}, "every audit tests its distribution"),
    ],
)
def test_options_out_of_range_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        replace(BRIEF, **values)


def test_drafters_that_cannot_be_audited_are_named(llm: LLM) -> None:
    for names, message in ((["none"], "nothing to audit"), (["ngram", "ngram"], "twice"), (["ngrm"], "'ngram'")):
        with pytest.raises(RequestError, match=message):
            find(llm, names, LoadOptions(), bundled=False)
    with pytest.raises(ModelError, match="profile"):
        find(llm, ["skip"], LoadOptions(), bundled=False)
    audited, left_out = find(llm, [], LoadOptions(), bundled=False)
    assert "model" not in [it.name for it in audited] and "skip" in left_out


CASE = '{"format":1,"batch":%d,"index":%d,"asks":[{"prompt":[1],"params":{}}]}'


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", '{"format":9}', "[" * 100_000, CASE % (1, 3), CASE % (0, 0), CASE % (1, -1)],
    ids=["empty", "nothing", "list", "format", "deep", "index", "batch", "negative"],
)
def test_a_case_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="the case is not usable"):
        casefile.loads(text)


def run(*args: object) -> Any:
    return CliRunner().invoke(app, ["audit", *map(str, args)], prog_name="foredraft", catch_exceptions=False)


def test_the_command_refuses_before_it_loads(tmp_path: Path) -> None:
    done = run("--output", tmp_path / "missing" / "certificate.json")
    assert done.exit_code == 1 and "nothing was run" in done.stderr
    assert run("--draft", "none").exit_code == 2
    assert run("--gpu", "x").exit_code == 2
    assert run("--case", "{}", "--draft", "ngram").exit_code == 2
    assert run("--case", "{}").exit_code == 2  # which drafter?


def test_the_command_writes_its_certificate(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    path = tmp_path / "certificate.json"
    done = run("--model", tmp_path / "model", "--draft", "int4", "--quick", "--json", "--output", path)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(path.read_text())
    assert json.loads(done.stdout)["drafters"][0]["passed"]
    case = casefile.dumps(Case((Ask((1, 2), SamplingParams(seed=1, max_new_tokens=4), "", 2),), 1, 0))
    again = run("--model", tmp_path / "model", "--draft", "ngram", "--case", case)
    assert again.exit_code == 0 and "no difference in this case" in again.stderr and "PASSED" not in again.output


PROCESSORS = """
class Even:
    def __call__(self, ids, scores):
        scores[:, 1::2] = float("-inf")
        return scores


class Count(Even):
    def copy(self):
        return Count()


even, wrong = Even(), 3
"""


def test_settings_are_named_by_flags(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PROCESSORS)
    given = AuditFlags(
        stop=["end"], logit_bias=["3=-inf", "4=1.5"], processor=[f"{file}:{name}" for name in ("Even", "even", "Count")]
    )
    (own,) = audit_options(given).own
    assert own.stop == ("end",) and own.logit_bias == {3: -float("inf"), 4: 1.5}
    assert [type(it).__name__ for it in own.processors] == ["Even", "Even", "Stateful"]
    assert audit_options(AuditFlags()).own == ()
    assert f"--processor {file}:Even" in command(given)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--logit-bias", "x=1"], "ID=VALUE"),
        (["--logit-bias", "3"], "ID=VALUE"),
        (["--processor", "mine.py"], "FILE.py:NAME"),
        (["--processor", "/nowhere/mine.py:It"], "cannot be loaded"),
        (["--processor", "no_such_module:It"], "cannot be loaded"),
        (["--processor", "json:JSONDecodeError"], "name an object instead"),
        (["--processor", "string:digits"], "name a LogitsProcessor"),
    ],
)
def test_settings_that_are_none_cost_no_loading(flags: list[str], message: str) -> None:
    done = run("--model", "/nowhere", *flags)
    assert done.exit_code == 2 and message in done.stderr
