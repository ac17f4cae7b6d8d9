"""LLM as a program uses it: threads, open streams, callbacks that fail, and models that are somebody else's."""

import copy
import functools
import json
import threading
from typing import Any

import pytest
import torch
from fakes import Scripted
from models import ROPE, draws, tiny
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from foredraft import LLM, SamplingParams
from foredraft.cli.app import app
from foredraft.errors import ModelError, RequestError, VocabularyMismatchError
from foredraft.llm import BUNDLED
from foredraft.models.hf import HFModel
from foredraft.types import Request, Verdict

PARAMS = SamplingParams(max_new_tokens=24)
PROMPTS = [draws(3 + i, seed=i) for i in range(6)]


def test_threads_share_one_llm():
    llm = LLM(tiny("llama"), "ngram", max_batch_size=3)
    wanted = [llm.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]
    found: dict[int, list[int]] = {}

    def run(i: int) -> None:
        for _ in range(3):
            chunks = list(llm.stream(PROMPTS[i], PARAMS))
            assert chunks[-1].result is not None
            found[i] = [token for chunk in chunks for token in chunk.token_ids]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(i) for i in range(len(PROMPTS))] == wanted
    assert not llm.engine.has_work


def test_a_drafter_that_fails_for_one_text_takes_nothing_from_another():
    class Fails(Scripted):
        def observe(self, request: Request, verdict: Verdict) -> None:
            if request.seed == 2 and request.num_output > 4:
                raise KeyError("four")

    llm = LLM(tiny("llama"), Fails())
    wanted = llm.generate(PROMPTS[0], PARAMS).token_ids
    sound = llm.stream(PROMPTS[0], SamplingParams(max_new_tokens=24, seed=1))
    broken = llm.stream(PROMPTS[1], SamplingParams(max_new_tokens=24, seed=2))
    chunks = [next(sound), next(broken)]
    with pytest.raises(KeyError, match="four"):
        list(broken)
    chunks = [chunks[0], *sound]
    assert [token for chunk in chunks for token in chunk.token_ids] == wanted
    assert chunks[-1].finish_reason == "length"


def patched(model: PreTrainedModel) -> PreTrainedModel:
    model.forward = model.forward  # what accelerate's hooks, among others, do
    return model


def hooked(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[0].register_forward_hook(lambda module, args, out: out * 1.5)
    return model


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    """As LoRA layers do: a linear layer that has a weight, and does more."""

    class More(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.5

    q = model.model.layers[0].self_attn.q_proj
    more = More(q.in_features, q.out_features, bias=False)
    more.weight = q.weight
    model.model.layers[0].self_attn.q_proj = more
    return model


class Negated(LlamaForCausalLM):
    @functools.wraps(LlamaForCausalLM.forward)  # whatever this transformers calls the cache
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = -out.logits
        return out


def negated(model: PreTrainedModel) -> PreTrainedModel:
    made = Negated(model.config)
    made.load_state_dict(model.state_dict())
    return made.eval()


def doubled(model: PreTrainedModel) -> PreTrainedModel:
    return model.double()


@pytest.mark.filterwarnings("ignore::foredraft.errors.ExactnessWarning")  # torch's float64 on some processors
@pytest.mark.parametrize("change", [patched, hooked, adapted, negated, doubled])
def test_a_llama_that_computes_something_else_is_not_mistaken_for_one(change):
    model = change(tiny("llama"))
    ids = torch.tensor([PROMPTS[3]])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    llm = LLM(model, "ngram")
    assert isinstance(llm.model, HFModel)
    assert llm.generate(PROMPTS[3], PARAMS).token_ids == wanted[0, ids.shape[1] :].tolist()
    assert not isinstance(LLM(tiny("llama"), "none").model, HFModel)


def test_a_head_with_fewer_tokens_than_the_table():
    model, prompt = tiny("llama"), [token % 100 for token in PROMPTS[3]]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[:100].clone())
    model.lm_head.out_features = 100
    ids = torch.tensor([prompt])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    llm = LLM(model, "ngram")
    assert llm.model.vocab_size == 100
    with pytest.raises(ModelError, match="its head has 100 outputs, its table 160 rows"):
        LLM(model, "none", runtime="native")
    assert llm.generate(prompt, PARAMS).token_ids == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"num_hidden_layers": 1}, "it has 2 layers, and its configuration says 1"), ({"hidden_size": 32}, "other sizes")],
    ids=["layers", "sizes"],
)
def test_a_configuration_that_was_changed_since_the_model_was_made(change, said):
    """The library wrote beyond its pages."""
    model = tiny("llama")
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ModelError, match=said):
        LLM(model, "none", runtime="native")
    ids = torch.tensor([PROMPTS[3]])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert LLM(model, "ngram").generate(PROMPTS[3], PARAMS).token_ids == wanted[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("runtime", ["auto", "torch"])
@pytest.mark.parametrize("weight_format", ["int4", "int8"])
def test_narrow_keys_and_values_stay_plain_beside_queries_in_few_bits(weight_format, runtime):
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**ROPE | {"num_attention_heads": 16, "num_key_value_heads": 1})).eval()
    texts = [
        LLM(model, draft, weight_format=weight_format, runtime=runtime).generate(PROMPTS[3], PARAMS).token_ids
        for draft in ("none", "ngram")
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 24


@pytest.mark.filterwarnings("ignore::foredraft.errors.ExactnessWarning")  # some processors' products in fp32
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma2"])
def test_a_model_in_memory_stays_as_it_is(name):
    model = tiny(name).train()
    attention = model.config._attn_implementation
    before = copy.deepcopy(model.state_dict())
    ids = torch.tensor([[0, 0, *PROMPTS[0]], PROMPTS[2]])
    mask = (torch.arange(ids.shape[1]) >= torch.tensor([[2], [0]])).long()
    model.eval()
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    model.train()
    llm = LLM(model, tiny(name))
    llm.generate(PROMPTS[0], PARAMS)
    assert model.training
    assert model.config._attn_implementation == attention
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    found = model.eval().generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(found, wanted)


def test_a_draft_model_of_another_size():
    wide, narrow = tiny("llama"), tiny("llama", seed=1)
    narrow.resize_token_embeddings(100)
    with pytest.raises(VocabularyMismatchError, match=r"100 tokens and the target 160, .* by its folder"):
        LLM(wide, narrow)


def test_a_draft_with_fewer_tokens_leaves_texts_that_hold_others():
    """A checkpoint whose table was padded less than the target's: what it cannot read it does not draft for."""
    llm = LLM(tiny("llama"), tiny("llama"), policy="fixed")
    wanted = llm.generate([1, 2, 150], PARAMS)
    llm.drafter.model.vocab_size = 120
    found = llm.generate([1, 2, 150], PARAMS)
    assert (wanted.stats.drafted > 0, found.stats.drafted) == (True, 0)
    assert found.token_ids == wanted.token_ids


OPTIONS = [
    ({"dtype": "bfloat16"}, r"dtype='bfloat16' cannot be honoured: the model object is in memory already"),
    ({"device_map": "auto"}, r"device_map='auto' cannot be honoured"),
    ({"device_map": "auto", "device": "cpu"}, r"device='cpu' contradicts device_map='auto'"),
    ({"draft_dtype": "bfloat16"}, r"draft='ngram' has no model to load, so draft_dtype='bfloat16' cannot be honoured"),
    ({"draft": "int4", "draft_device": "cpu"}, r"drafts with the target's own weights, so draft_device='cpu' cannot"),
    ({"draft": "copy", "draft_dtype": "bfloat16"}, r"draft_dtype='bfloat16' cannot be honoured: the model object"),
    ({"draft_weight_format": "int4"}, r"no model to load, so draft_weight_format='int4' cannot be honoured"),
    (
        {"draft": ["suffix", "int4"], "draft_weight_format": "int8"},
        r"draft='suffix' has no model to load and draft='int4' drafts with the target's own weights, so draft_w",
    ),
    (
        {"draft": "copy", "draft_weight_format": "int3"},
        r"draft_weight_format='int3' is not known; use none, int8, int4",
    ),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_that_would_be_dropped(options, message):
    draft = options.get("draft", "ngram")
    place = {name: value for name, value in options.items() if name != "draft"}
    with pytest.raises(RequestError, match=message):
        LLM(tiny("llama"), tiny("llama") if draft == "copy" else draft, **place)


def test_what_cannot_draft():
    with pytest.raises(ModelError, match="draft=5 cannot draft; give a name"):
        LLM(tiny("llama"), 5)
    with pytest.raises(ModelError, match="draft='ngram' takes no profile"):
        LLM(tiny("llama"), "ngram", force_profile=True)


@pytest.mark.parametrize("prompts", [None, 5])
def test_what_is_no_prompt(prompts):
    with pytest.raises(RequestError, match=f"prompts={prompts} is not usable; give text, token ids"):
        LLM(tiny("llama"), "none").generate(prompts)


def test_what_is_no_request():
    llm = LLM(tiny("llama"), "none")
    for prompt in (["a", "b"], [1, "a"], [[1], [2]], [1.5]):
        with pytest.raises(RequestError, match="is not usable; give one text, or one list of token ids"):
            llm.stream(prompt)
    with pytest.raises(RequestError, match=r"params=\{'temperature': 1\} is not usable; pass SamplingParams"):
        llm.generate([1, 2], {"temperature": 1})
    with pytest.raises(RequestError, match="num_draft_tokens='4' is not usable; it must be whole and in"):
        llm.generate([1, 2], num_draft_tokens="4")


def test_prompts_as_tensors():
    llm = LLM(tiny("llama"), "none")
    many = [PROMPTS[0], PROMPTS[0][::-1]]
    wanted = [result.token_ids for result in llm.generate(many, PARAMS)]
    assert [result.token_ids for result in llm.generate(torch.tensor(many), PARAMS)] == wanted
    assert llm.generate(torch.tensor(many[0]), PARAMS).token_ids == wanted[0]


# --- stop strings of the bundled pair, where <|end|> ends a turn and is no text ---

QUESTION = "User: I need a table for two in Oakland tonight.\nAssistant:"


@pytest.fixture(scope="module")
def bundled() -> LLM:
    return LLM(dtype="float32")


@pytest.fixture(scope="module")
def original() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BUNDLED / "target", dtype=torch.float32)


@pytest.mark.parametrize("num_draft_tokens", [None, 0, 6])
@pytest.mark.parametrize("stop", ["<|end|>", "<|end|>\nUser:", "?<|end|>", "reservation for?<|end|>\n", "\nUser:"])
def test_stop_strings_with_special_tokens_end_where_transformers_ends(
    bundled: LLM, original: PreTrainedModel, stop: str, num_draft_tokens: int | None
) -> None:
    tokenizer, params = bundled.tokenizer, SamplingParams(max_new_tokens=40, stop=stop, ignore_eos=True)
    inputs = tokenizer(QUESTION, return_tensors="pt")
    ids = original.generate(
        **inputs, max_new_tokens=40, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
    )[0, inputs["input_ids"].shape[1] :].tolist()  # fmt: skip
    chunks = list(bundled.stream(QUESTION, params, num_draft_tokens=num_draft_tokens))
    result = chunks[-1].result
    assert result is not None and len(ids) < 40
    assert (result.token_ids, result.finish_reason) == (ids, "stop")
    written = tokenizer.decode(ids).partition(stop)[0]
    assert result.text == "".join(chunk.text for chunk in chunks) == written.replace("<|end|>", "")
    assert "".join(piece for chunk in chunks for piece, _ in chunk.pieces) == result.text
    assert bundled.generate([QUESTION] * 3, params, num_draft_tokens=num_draft_tokens)[2].text == result.text


def test_a_chat_and_the_command_line_stop_at_special_tokens(bundled: LLM) -> None:
    question, stop = QUESTION.removeprefix("User: ").partition("\n")[0], "?<|end|>\nUser"
    params = SamplingParams(max_new_tokens=40, stop=stop, ignore_eos=True)
    plain = bundled.generate(QUESTION, params)
    done = CliRunner().invoke(
        app, ["generate", "--raw", "--json", "--dtype", "fp32", "--ignore-eos", "--stop", stop, QUESTION]
    )
    answer = json.loads(done.stdout)
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == (plain.text, plain.token_ids, "stop")
    chat = bundled.chat([{"role": "user", "content": question}], SamplingParams(max_new_tokens=40, stop="?<|end|>"))
    assert chat.finish_reason == "stop"
    assert not chat.text.endswith("?") and bundled.tokenizer.decode(chat.token_ids).endswith("?<|end|>")
