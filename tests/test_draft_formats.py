"""A draft model's weights in fewer bits: which it gets unasked, what may be asked for, and that no text hears of it."""

import pytest
import torch
from models import tiny

from foredraft import LLM, SamplingParams, convert
from foredraft.audit.subjects import find
from foredraft.cli.audit import AuditFlags, audit_options, command
from foredraft.cli.bench import BenchFlags, who_drafts
from foredraft.cli.tune import TuneFlags, tune_options
from foredraft.diagnosis.diagnose import diagnose
from foredraft.drafters import make
from foredraft.errors import RequestError
from foredraft.integrations.transformers import AutoModelForCausalLM, accelerate
from foredraft.llm import BUNDLED
from foredraft.models.load import LoadOptions
from foredraft.tuning.candidates import find_candidates
from foredraft.tuning.options import TuneOptions

PARAMS = SamplingParams(max_new_tokens=48, temperature=0.8, seed=4, ignore_eos=True)
PROMPTS = ["User: I need a taxi.\nAssistant:", "User: Find me a film.\nAssistant:"]


def kernels(llm: LLM) -> set[str]:
    return set(llm.drafter.model.kernels)


def test_a_draft_model_gets_the_bits_that_suit_its_size(monkeypatch):
    assert kernels(LLM(draft=str(BUNDLED / "draft"), runtime="native")) == {"int4"}
    monkeypatch.setattr(make, "HEAVY", 0.5)  # of the target's bytes; the bundled draft has a fifth
    assert kernels(LLM(draft=str(BUNDLED / "draft"), runtime="native")) == {"int8"}


@pytest.mark.parametrize("asked", ("none", "int8", "int4"))
def test_what_is_asked_for_is_done_and_no_token_changes(asked):
    llm = LLM(draft=str(BUNDLED / "draft"), runtime="native", draft_weight_format=asked)
    assert kernels(llm) == {"bf16" if asked == "none" else asked}
    plain = llm.generate(PROMPTS, PARAMS, num_draft_tokens=0)
    drafted = llm.generate(PROMPTS, PARAMS, num_draft_tokens=5)
    assert [result.token_ids for result in drafted] == [result.token_ids for result in plain]
    assert all(result.stats.draft_acceptance_rate > 0.3 for result in drafted)


@pytest.mark.parametrize("asked", ("none", "int8"))
def test_a_bench_says_which_it_is(asked):
    draft = BUNDLED / "draft"
    llm = LLM(draft=str(draft), runtime="native", draft_weight_format=asked)
    assert who_drafts(llm.drafter, BenchFlags(draft=str(draft))) == f"draft ({'bf16' if asked == 'none' else asked})"


def test_torch_does_what_is_asked_for_too():
    target, draft = tiny("llama", torch.bfloat16), tiny("llama", torch.bfloat16)
    made = [LLM(target, draft, runtime="torch", draft_weight_format=asked) for asked in ("none", "int8", "int4")]
    sizes = [llm.memory["draft_weights"] for llm in made]
    assert sizes[0] > sizes[1] > sizes[2]
    texts = {tuple(llm.generate([1, 2, 3], PARAMS, num_draft_tokens=3).token_ids) for llm in made}
    assert len(texts) == 1


def test_what_is_in_few_bits_already_is_not_rounded_again(tmp_path):
    convert(BUNDLED / "draft", tmp_path / "low", weight_format="int8")
    assert LLM(draft=str(tmp_path / "low")).generate(PROMPTS[0], PARAMS).token_ids
    with pytest.raises(
        RequestError, match=r"draft_weight_format='int4' cannot be honoured: .*low is in few bits already"
    ):
        LLM(draft=str(tmp_path / "low"), draft_weight_format="int4")


def test_a_bench_on_torch_says_what_computes_its_draft_too():
    draft = BUNDLED / "draft"
    llm = LLM(draft=str(draft), runtime="torch", draft_weight_format="int4")
    assert who_drafts(llm.drafter, BenchFlags(draft=str(draft))) == "draft (int4)"


def test_doctor_audit_tune_and_the_drop_in_take_it_as_well():
    name = str(BUNDLED / "draft")
    assert diagnose(None, name, runtime="native", draft_weight_format="int8").serving.draft.kernels.keys() == {"int8"}
    target = LLM(draft="none", runtime="native")
    for asked in ("int8", "int4"):
        audited, _ = find(target, [name], LoadOptions(), bundled=True, weight_format=asked)
        found = find_candidates(target, TuneOptions((name,), draft_weight_format=asked), LoadOptions())
        loaded = AutoModelForCausalLM.from_pretrained(BUNDLED / "target", draft=name, draft_weight_format=asked)
        drafters = [audited[0].drafter, found.drafters[name], loaded.engine.drafter]
        assert [set(drafter.model.kernels) for drafter in drafters] == [{asked}] * 3


AMISS = r"draft_weight_format='int3' is not known; use none, int8, int4"
NONE = r"draft='suffix' has no model to load, so draft_weight_format='int8' cannot be honoured; leave it out"


@pytest.mark.parametrize(("draft", "asked", "message"), [("auto", "int3", AMISS), ("suffix", "int8", NONE)])
def test_and_refuse_it_alike_before_anything_is_loaded(draft, asked, message):
    model = str(BUNDLED / "target")
    with pytest.raises(RequestError, match=message):
        diagnose(model, draft, draft_weight_format=asked)
    with pytest.raises(RequestError, match=message):
        audit_options(AuditFlags(model=model, draft=[draft], draft_weight_format=asked))
    with pytest.raises(RequestError, match=message):
        tune_options(TuneFlags(model=model, draft=[draft], draft_weight_format=asked))
    with pytest.raises(RequestError, match=message):
        AutoModelForCausalLM.from_pretrained(model, draft=draft, draft_weight_format=asked)
    with pytest.raises(RequestError, match=message):
        accelerate(tiny("llama"), draft, draft_weight_format=asked)


def test_bits_of_no_draft_model_are_refused():
    with pytest.raises(RequestError, match="draft_weight_format='int8' cannot be honoured: no draft model is named"):
        TuneOptions(draft_weight_format="int8")
    with pytest.raises(RequestError, match="draft='auto' has no model to load"):
        audit_options(AuditFlags(model=str(BUNDLED / "draft"), draft_weight_format="int8"))


def test_a_failing_audit_can_be_repeated_with_its_bits():
    assert command(AuditFlags(draft_weight_format="int8")) == "foredraft audit --draft-weight-format int8"
