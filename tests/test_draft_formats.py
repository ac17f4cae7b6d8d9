"""A draft model's weights in fewer bits: which it gets unasked, what may be asked for, and that no text hears of it."""

import pytest
import torch
from models import tiny

from foredraft import LLM, SamplingParams, convert
from foredraft.cli.bench import BenchFlags, who_drafts
from foredraft.drafters import make
from foredraft.errors import RequestError
from foredraft.llm import BUNDLED

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
