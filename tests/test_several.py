"""Several drafters in one LLM: who is asked, who is told, what is counted, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from fakes import Scripted
from models import VOCAB, draws, tiny
from transformers import LogitsProcessor
from typer.testing import CliRunner

from foredraft import LLM, Draft, SamplingParams, Structured, profile
from foredraft.cli.app import app
from foredraft.diagnosis import serving
from foredraft.drafters.base import NoDrafter
from foredraft.drafters.listed import automatic
from foredraft.drafters.make import DraftContext
from foredraft.drafters.memory import SuffixMemory
from foredraft.drafters.model import ModelDrafter
from foredraft.drafters.registry import split
from foredraft.drafters.self_draft import SelfDrafter
from foredraft.drafters.several import Several, drafters_of
from foredraft.drafters.suffix import SuffixDrafter
from foredraft.errors import ModelError, RequestError
from foredraft.models.base import SkipSet
from foredraft.models.load import LoadOptions, wrap
from foredraft.policy import Choice, Fixed, Gain
from foredraft.types import Request, Verdict
from foredraft.waiting import run

PARAMS = SamplingParams(max_new_tokens=40)
PROMPT = draws(12) * 2


class Script(Scripted):
    """Drafts the true text, or another one, and notes what it hears."""

    def __init__(self, name: str, text: list[int] | None = None) -> None:
        self.name, self.text = name, text
        self.proposed = 0
        self.heard: list[tuple[int, ...]] = []
        self.forgot = 0

    def tokens(self, request: Request) -> list[int]:
        self.proposed += 1
        if self.text is None:
            return [(request.token_ids[-1] + 1) % VOCAB] * request.draft_limit
        return self.text[len(request.token_ids) :][: request.draft_limit]

    def observe(self, request: Request, verdict: Verdict) -> None:
        self.heard.append(verdict.accepted)

    def forget(self, request: Request) -> None:
        self.forgot += 1


def truth(params: SamplingParams = PARAMS) -> list[int]:
    return PROMPT + LLM(tiny("llama"), "none").generate(PROMPT, params).token_ids


def listed(*drafters: object, **options: object) -> LLM:
    return LLM(tiny("llama"), list(drafters), **options)  # type: ignore[arg-type]


def test_the_one_that_is_right_drafts_nearly_everything() -> None:
    right, wrong = Script("right", truth()), Script("wrong")
    llm = listed(wrong, right)
    assert isinstance(llm.engine.policy.policy, Choice)
    for _ in range(6):
        result = llm.generate(PROMPT, PARAMS, num_draft_tokens=4)
    assert PROMPT + result.token_ids == right.text
    by = result.stats.by_source
    assert by["right"].accepted > 20 and by["right"].drafted == by["right"].accepted
    assert wrong.proposed < right.proposed


def test_counters_by_drafter_add_up() -> None:
    llm = listed("suffix", "int8", Script("wrong"))
    results = llm.generate([PROMPT, draws(9), draws(20, seed=3)], PARAMS)
    for result in results:
        stats = result.stats
        assert sum(it.drafted for it in stats.by_source.values()) == stats.drafted
        assert sum(it.accepted for it in stats.by_source.values()) == stats.accepted
        assert sum(it.drafts for it in stats.by_source.values()) == stats.drafts
        assert 0 < sum(it.seconds for it in stats.by_source.values()) <= stats.seconds_drafting * 1.01
    assert set(stats.by_source) <= {"suffix", "int8", "wrong"}
    assert json.loads(json.dumps(stats.as_dict()))["by_source"]["int8"]["drafted"] == stats.by_source["int8"].drafted
    total = llm.engine.stats.by_source["int8"]
    assert total.drafted == sum(result.stats.by_source["int8"].drafted for result in results)


def test_one_drafter_is_counted_too_and_plain_decoding_is_nobodys() -> None:
    llm = LLM(tiny("llama"), "int8")
    stats = llm.generate(PROMPT, PARAMS).stats
    assert set(stats.by_source) == {"int8"} and stats.by_source["int8"].drafted == stats.drafted
    assert stats.by_source["int8"].seconds == pytest.approx(stats.seconds_drafting, rel=0.5)
    assert LLM(tiny("llama"), "none").generate(PROMPT, PARAMS).stats.by_source == {}


def test_who_drafts_is_told_what_became_of_it_and_all_of_the_end() -> None:
    right, other = Script("right", truth()), Script("other")
    result = listed(right, other).generate(PROMPT, PARAMS)
    for one in (right, other):
        source = result.stats.by_source.get(one.name)
        told = sum(map(len, one.heard))
        assert told == (source.accepted if source else 0) and len(one.heard) <= one.proposed
    assert right.heard and right.forgot == other.forgot == 1


def test_a_model_that_is_not_chosen_computes_nothing() -> None:
    llm = listed("suffix", "int8")
    passes: list[int] = []
    int8 = drafters_of(llm.drafter)[1]
    assert isinstance(int8, SelfDrafter)
    propose = int8.propose
    int8.propose = lambda *asked: passes.append(1) or propose(*asked)  # type: ignore[method-assign]
    llm.generate(PROMPT, PARAMS, draft="suffix")
    assert not passes
    llm.generate(PROMPT, PARAMS, draft="int8", num_draft_tokens=3)
    assert passes


@pytest.mark.parametrize("name", ["suffix", "int8", "none"])
def test_a_request_may_name_its_drafter(name: str) -> None:
    llm = listed("suffix", "int8")
    wanted = LLM(tiny("llama"), "none").generate(PROMPT, PARAMS).token_ids
    result = llm.generate(PROMPT, PARAMS, draft=name)
    assert result.token_ids == wanted
    assert {who for who, it in result.stats.by_source.items() if it.drafted} <= {name}
    assert (result.stats.drafted > 0) == (name == "int8") or name == "suffix"


def test_a_request_may_ask_for_a_length_or_for_nothing() -> None:
    llm = listed("suffix", "int8")
    exact = llm.generate(PROMPT, PARAMS, num_draft_tokens=2).stats
    assert len(exact.drafted_at) == 2 and exact.drafts >= exact.target_passes - 3
    assert llm.generate(PROMPT, PARAMS, num_draft_tokens=0).stats.drafted == 0
    *_, last = llm.stream(PROMPT, PARAMS, draft="none")
    assert last.result is not None and last.result.stats.drafted == 0


def test_under_rejection_a_given_length_keeps_to_one_drafter_so_that_a_seed_repeats_its_text() -> None:
    llm = listed("suffix", "int8")
    params = SamplingParams(max_new_tokens=40, temperature=1.0, seed=4, verifier="rejection")
    first, second = (llm.generate(PROMPT, params, num_draft_tokens=3) for _ in range(2))
    assert first.token_ids == second.token_ids
    for result in (first, second):
        assert {who for who, it in result.stats.by_source.items() if it.drafted} == {"int8"}


def test_requests_of_one_batch_may_draft_differently() -> None:
    llm = listed("suffix", "int8")
    jobs = [llm.job(PROMPT, PARAMS, draft=name) for name in ("suffix", "int8", "auto", "none", None)]
    results = run(llm.runner, jobs)
    assert len({tuple(result.token_ids) for result in results}) == 1
    used = [{who for who, it in r.stats.by_source.items() if it.drafted} for r in results]
    assert used[0] <= {"suffix"} and used[1] == {"int8"} and used[3] == used[4] == set()
    assert results[2].stats.drafted  # "auto" is the default, and None is plain as for LLM


def test_drafts_of_one_model_are_computed_together() -> None:
    llm = listed(Script("wrong"), "int8", max_batch_size=4)
    widest = 0
    int8 = llm.drafter.drafters["int8"]  # type: ignore[attr-defined]
    propose = int8.propose

    def watched(requests, policy):
        nonlocal widest
        widest = max(widest, len(requests))
        return propose(requests, policy)

    int8.propose = watched
    llm.generate([draws(8 + i, seed=i) for i in range(4)], PARAMS, draft="int8", num_draft_tokens=2)
    assert widest == 4


def test_without_a_policy_that_chooses_the_first_that_has_a_draft_wins() -> None:
    silent, right = Scripted(), Script("right", truth())
    llm = listed(silent, right, Script("wrong"), policy="fixed")
    assert isinstance(llm.engine.policy.policy, Fixed)
    stats = llm.generate(PROMPT, PARAMS).stats
    assert {who for who, it in stats.by_source.items() if it.drafted} == {"right"}


class Only(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, 7] += 1e4
        return scores


def test_lookup_takes_over_where_the_text_repeats() -> None:
    llm = listed("suffix", Script("wrong"))
    params = SamplingParams(max_new_tokens=120, processors=(Only(),))
    llm.generate(PROMPT, params, num_draft_tokens=6)
    stats = llm.generate(PROMPT, params, num_draft_tokens=6).stats
    assert stats.by_source["suffix"].accepted > 80


def test_forced_tokens_come_first_and_are_counted_apart() -> None:
    llm = LLM(max_batch_size=1)
    form = Structured.regex(r'\{"place": "(Oakland|Napa)", "guests": [1-9]\}')
    params = SamplingParams(max_new_tokens=60, structured=form)
    plain = llm.generate("User: A table in Napa.\nAssistant:", params, draft="none")
    result = llm.generate("User: A table in Napa.\nAssistant:", params)
    assert result.token_ids == plain.token_ids
    assert result.stats.by_source["forced"].accepted > 0
    assert sum(it.drafted for it in result.stats.by_source.values()) == result.stats.drafted


# What auto is


def context(target: object) -> DraftContext:
    return DraftContext(wrap(target), None, LoadOptions("float32", "cpu"))  # type: ignore[arg-type]


def test_auto_is_lookup_and_the_bundled_draft_for_the_bundled_target() -> None:
    llm = LLM()
    assert isinstance(llm.drafter, Several)
    suffix, model = drafters_of(llm.drafter)
    assert isinstance(suffix, SuffixDrafter) and isinstance(model, ModelDrafter)
    assert llm.drafter.reasons == {"suffix": "costs next to nothing", "model": "came with this target"}
    assert llm.memory["draft_weights"] == model.weight_bytes > 0
    described = serving.describe(llm, None, "auto", 0.0)
    assert described.draft is not None and described.reasons == llm.drafter.reasons


def test_auto_is_lookup_alone_where_nothing_else_is_known() -> None:
    llm = LLM(tiny("llama"))
    assert isinstance(llm.drafter, SuffixDrafter) and llm.drafter.memory is not None
    assert isinstance(llm.engine.policy.policy, Gain)


@pytest.mark.parametrize(("speedup", "names"), [(1.3, ["suffix", "int4+skip"]), (1.02, ["suffix"])])
def test_auto_takes_a_self_draft_where_the_profile_says_that_it_pays(
    speedup: float, names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FOREDRAFT_CACHE", str(tmp_path))
    target = tiny("llama")
    measured = {
        "skip": profile.ProfileFigures(0.8, 0.7, 3, 1.01),
        "int4+skip": profile.ProfileFigures(0.8, 0.4, 3, speedup),
    }
    profile.save(profile.profile_for(wrap(tiny("llama")), SkipSet((1,), ()), measured, profile.HowFound()))
    made = automatic(context(target))
    assert [drafter.name for drafter in drafters_of(made)] == names
    if isinstance(made, Several):
        assert "1.30 times" in made.reasons["int4+skip"]


def test_auto_lives_with_a_damaged_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOREDRAFT_CACHE", str(tmp_path))
    path = profile.save(profile.profile_for(wrap(tiny("llama")), SkipSet((1,), ()), {}, profile.HowFound()))
    path.write_text("{")
    assert automatic(context(tiny("llama"))).name == "suffix"


# What a list may hold


def test_draft_models_in_a_list_are_numbered() -> None:
    llm = listed("suffix", tiny("llama", seed=1), tiny("llama", seed=2))
    assert llm.drafter.name == "suffix, model, model-2"
    assert llm.generate(PROMPT, PARAMS).token_ids == truth()[len(PROMPT) :]


def test_a_list_of_one_is_that_one() -> None:
    assert isinstance(listed("suffix").drafter, SuffixDrafter)
    assert isinstance(listed("none").drafter, NoDrafter)


def test_a_memory_of_ones_own_may_be_listed() -> None:
    memory = SuffixMemory(VOCAB)
    listed(SuffixDrafter(memory), "int8").generate(PROMPT, PARAMS, draft="int8")
    assert len(memory) == 1  # what was said is kept, whoever drafted it


BAD = [
    (["suffix", "sufix"], RequestError, r"draft='sufix' is not known; did you mean 'suffix'\?"),
    (["suffix", "int4", "suffix"], RequestError, r"draft=\['suffix', 'int4', 'suffix'\] names 'suffix' twice"),
    (["int4", "none"], RequestError, r"leave 'none' out; plain decoding is always among the choices"),
    (["int4", None], RequestError, r"leave NoneType out"),
    (["auto", "int4"], RequestError, r"'auto' makes a list itself; give it alone"),
    ([], RequestError, r"draft=\[\] names no drafter"),
    (["int4", "skip"], ModelError, r"draft=\['int4', 'skip'\], 'skip': no skip profile is known .* leave it out"),
    (["int4", "int4+skip"], ModelError, r"'int4\+skip': no skip profile is known"),
    (["suffix", 3], ModelError, r"draft=3 cannot draft"),
    ([Scripted(), Scripted()], RequestError, r"two drafters are called 'scripted'"),
    ([Several([Scripted()]), "int4"], RequestError, r"a list cannot hold another"),
]


@pytest.mark.parametrize(("drafts", "error", "message"), BAD)
def test_lists_that_cannot_be(drafts, error, message, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOREDRAFT_CACHE", str(tmp_path))
    with pytest.raises(error, match=message):
        listed(*drafts)


def test_options_that_no_drafter_of_the_list_can_take(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"draft=\['suffix', 'int4'\] takes no profile"):
        listed("suffix", "int4", draft_profile=tmp_path / "p.json")
    with pytest.raises(RequestError, match="draft_dtype='bfloat16' cannot be honoured"):
        listed("suffix", "int4", draft_dtype="bfloat16")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"draft": "sufix"}, r"draft='sufix' is not among this LLM's drafters; did you mean 'suffix'\?"),
        ({"draft": "medusa"}, r"use one of suffix, int8, or name it in LLM\(draft=\[...\]\)"),
        ({"draft": "none", "num_draft_tokens": 3}, r"draft='none' contradicts num_draft_tokens=3"),
        ({"draft": None, "num_draft_tokens": 3}, r"draft=None contradicts num_draft_tokens=3"),
    ],
)
def test_a_request_cannot_name_what_is_not_there(asked, message) -> None:
    with pytest.raises(RequestError, match=message):
        listed("suffix", "int8").generate(PROMPT, PARAMS, **asked)


def test_the_command_line_takes_several(tmp_path: Path) -> None:
    assert split("int4") == "int4" and split("suffix, int4") == ["suffix", "int4"]
    odd = tmp_path / "a,b"
    odd.mkdir()
    assert split(str(odd)) == str(odd)
    ran = CliRunner().invoke(app, ["generate", "--draft", "suffix,int4", "--json", "--max-new-tokens", "8", "hello"])
    assert ran.exit_code == 0, ran.output
    answer = json.loads(ran.stdout)
    assert answer["draft"] == "suffix, int4" and "by_source" in answer["stats"]


def test_a_wrong_draft_of_one_never_shows_in_the_text() -> None:
    class Tree(Scripted):
        name = "tree"

        def propose(self, requests, policy):
            return [Draft((1, 2), self.name, parents=(-1, -1)) for _ in requests]

    with pytest.raises(Exception, match="tree"):
        listed("suffix", Tree()).generate(PROMPT, PARAMS)
    assert torch.is_grad_enabled()
