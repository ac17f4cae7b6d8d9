"""Under rejection sampling a seed repeats its text whoever drafts beside it: q depends on a request's own rows."""

import pytest
import torch
from models import draws, tiny

from foredraft import LLM, SamplingParams
from foredraft.types import Draft, Request

PROMPTS = [
    "User: I need a table for two in Oakland tonight.\nAssistant:",
    "User: Find me a movie in Berkeley.\nAssistant:",
    "User: What's the weather?\nAssistant:" * 12,
    "User: I want to book a flight to Paris.\nAssistant:",
    "User: Play some jazz.\nAssistant:" * 4,
]


def watch(llm: LLM) -> dict[tuple[int, int], torch.Tensor]:
    """Every q by seed and place, as the drafter hands it over."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    propose = llm.drafter.propose

    def watched(requests: list[Request], policy) -> list[Draft]:
        drafts = propose(requests, policy)
        for request, draft in zip(requests, drafts, strict=True):
            if draft.probs is not None:
                found[request.seed, len(request.token_ids)] = draft.probs
        return drafts

    llm.drafter.propose = watched
    return found


def check(llm: LLM, prompts: list, seeds: range, tokens: int) -> None:
    """Together and one by one: equal texts, and equal bits of q wherever both drafted."""
    q = watch(llm)
    params = [SamplingParams(temperature=1.0, seed=s, verifier="rejection", max_new_tokens=tokens) for s in seeds]
    asked = [prompts[seed % len(prompts)] for seed in seeds]
    together = [result.token_ids for result in llm.generate(asked, params, num_draft_tokens=4)]
    in_batch = dict(q)
    q.clear()
    alone = [llm.generate(p, own, num_draft_tokens=4).token_ids for p, own in zip(asked, params, strict=True)]
    assert alone == together
    assert in_batch.keys() == q.keys() and len(q) > len(asked)
    assert all(torch.equal(in_batch[place], q[place]) for place in q)


@pytest.mark.parametrize(("draft", "cases", "tokens"), [("auto", 40, 40), ("int8", 8, 40), ("int4", 8, 40)])
def test_a_seed_repeats_its_text_in_a_batch_and_alone(draft: str, cases: int, tokens: int) -> None:
    check(LLM(None, draft, dtype="bfloat16"), PROMPTS, range(cases), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_a_draft_model_that_the_lean_decoder_does_not_serve(dtype: torch.dtype) -> None:
    llm = LLM(tiny("gpt2", dtype), tiny("gpt_neox", dtype, seed=1))
    check(llm, [draws(3 + 60 * i, seed=i) for i in range(5)], range(8), 30)
