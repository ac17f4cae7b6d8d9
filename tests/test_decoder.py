"""Greedy text in fp32 equals transformers' `generate` token for token: every architecture, with and without drafts."""

import copy
import warnings

import pytest
import torch
from models import CONFIGS, SLIDING, tiny
from transformers import GenerationConfig

from foredraft import LLM, SamplingParams
from foredraft.models.decoder import Decoder
from foredraft.models.family import FAMILY
from foredraft.models.hf import HFModel

NEW_TOKENS = 48
PROMPTS = ([5], [3, 1, 4, 1, 5, 9, 2, 6], [(7 * i) % 150 for i in range(70)])


def reference(name: str) -> list[list[int]]:
    model = tiny(name)
    settings = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=None)
    texts = []
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            texts.append(made[0, len(prompt) :].tolist())
    return texts


@pytest.mark.filterwarnings("ignore::foredraft.errors.ExactnessWarning")  # some processors' products in fp32
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_equals_transformers_generate(name):
    wanted = reference(name)
    assert all(len(text) == NEW_TOKENS for text in wanted)
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    plain, drafted = (LLM(tiny(name), draft, runtime="torch") for draft in (None, "ngram"))
    assert isinstance(plain.model, Decoder if name in FAMILY else HFModel)
    assert [plain.generate(list(prompt), params).token_ids for prompt in PROMPTS] == wanted
    results = drafted.generate([list(prompt) for prompt in PROMPTS], params, num_draft_tokens=4)
    assert [result.token_ids for result in results] == wanted


def test_the_family_is_the_lean_decoders():
    assert set(FAMILY) <= set(CONFIGS)
    assert SLIDING["mistral"] < len(PROMPTS[2])  # the window is crossed, in prompt and output


@pytest.mark.parametrize("name", FAMILY)
def test_a_users_model_object_is_left_as_it_was(name):
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    ids = torch.tensor([PROMPTS[1]])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    LLM(model, "ngram", runtime="torch").generate(list(PROMPTS[1]), SamplingParams(max_new_tokens=8))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert model.config.to_dict() == config
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, logits)
