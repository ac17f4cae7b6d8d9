"""Every mistake a user can make gets an error that says what is wrong, the value, and what to do about it."""

import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from models import mamba, runtimes, tiny
from transformers import BertConfig, BertModel, LogitsProcessor

from foredraft import LLM, SamplingParams
from foredraft.drafters.memory import SuffixMemory
from foredraft.drafters.suffix import SuffixDrafter
from foredraft.errors import (
    CacheMemoryError,
    ForedraftError,
    ModelError,
    NumericsError,
    PromptTooLongError,
    RequestError,
    UnsupportedModelError,
    VocabularyMismatchError,
    missing_extra,
)
from foredraft.integrations.transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny("llama"), "ngram", max_model_len=64, max_batch_size=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small real checkpoint with a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    tiny("llama").save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(160)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


# Models


def test_the_checkpoint_itself_is_sound(checkpoint):
    assert len(LLM(checkpoint, "none").generate("w1 w2", SamplingParams(max_new_tokens=3)).token_ids) == 3


def test_missing_path():
    with pytest.raises(ModelError, match=r"no model at /nowhere/llama: the path does not exist; give a folder"):
        LLM("/nowhere/llama")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json, so it is no model folder"):
        LLM(tmp_path)


def test_not_a_causal_model(tmp_path, checkpoint):
    folder = copy(checkpoint, tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    BertModel(BertConfig(vocab_size=160, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        folder
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsupportedModelError, match=r"'bert' cannot serve: it is no causal language model"):
            LLM(folder)


def test_state_that_cannot_be_rewound():
    with pytest.raises(UnsupportedModelError, match=r"'mamba' cannot serve: .*cannot be rewound"):
        LLM(mamba())


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_corrupt_safetensors(tmp_path, checkpoint, damage):
    weights = copy(checkpoint, tmp_path / "broken") / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes({"truncated": content[: len(content) // 2], "header": b"x" * 64, "empty": b""}[damage])
    with pytest.raises(ModelError, match=r"the weights of .*broken are damaged .*; download or convert them again"):
        LLM(weights.parent)


def test_missing_weights(tmp_path, checkpoint):
    folder = copy(checkpoint, tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"bare has no weights .*; download or convert it again"):
        LLM(folder)


def test_a_damaged_tokenizer(tmp_path, checkpoint):
    folder = copy(checkpoint, tmp_path / "mute")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"mute has no tokenizer that loads"):
        LLM(folder)


def test_a_folder_without_a_tokenizer_serves_token_ids(tmp_path, checkpoint):
    folder = copy(checkpoint, tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    mute = LLM(folder)
    params = SamplingParams(max_new_tokens=8)
    assert mute.generate([1, 2, 3], params).token_ids == LLM(checkpoint).generate([1, 2, 3], params).token_ids
    with pytest.raises(RequestError, match=r"a model without a tokenizer; pass tokenizer="):
        mute.generate("w1 w2")


def test_a_chat_template_of_the_users_own(checkpoint, tmp_path):
    text = "{% for m in messages %}w1 {{ m.content }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(text)
    for given in (tmp_path / "own.jinja", str(tmp_path / "own.jinja"), text):
        llm = LLM(checkpoint, chat_template=given)
        asked = llm.chat_job([{"role": "user", "content": "w2"}], SamplingParams(max_new_tokens=1)).request
        assert llm.tokenizer.decode(asked.token_ids).split() == ["w1", "w2"]
    tokenizer = llm.tokenizer
    with pytest.raises(RequestError, match=r"chat_template contradicts tokenizer; set tokenizer\.chat_template"):
        LLM(checkpoint, tokenizer=tokenizer, chat_template=text)
    with pytest.raises(RequestError, match="chat_template needs a tokenizer, and this model has none"):
        LLM(tiny("llama"), chat_template=text)


def test_a_chat_template_that_is_empty_is_told_so(checkpoint):
    with pytest.raises(RequestError, match="chat_template='' is empty; give a file with a Jinja template, or its text"):
        LLM(checkpoint, chat_template="")


@pytest.mark.parametrize(
    "text, told",
    [
        (None, r"own.jinja' cannot be read: No such file or directory; give a file with a Jinja template"),
        (
            "{% for m in messages %}\n{{ m.content }\n{% endfor %}",
            r"own.jinja' is malformed in line 2: unexpected '}'; ",
        ),
        ("Hello", "own.jinja' is no chat template: nothing in it writes the messages"),
        ('{"chat_template": "{{ messages }}"}', "own.jinja' is JSON; a template is Jinja: give what stands under its"),
    ],
)
def test_a_chat_template_that_is_none(checkpoint, tmp_path, text, told):
    if text is not None:
        (tmp_path / "own.jinja").write_text(text)
    with pytest.raises(RequestError, match=told):
        LLM(checkpoint, chat_template=tmp_path / "own.jinja")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float8"}, r"dtype='float8' is not known; use auto, "),
        ({"device": "quantum"}, r"device='quantum' is not known; use auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, r"device='cuda:99': this machine has \d+ CUDA devices; use cpu"),
        ({"draft_device": "abacus"}, r"device='abacus' is not known"),
        ({"draft_dtype": "int3"}, r"dtype='int3' is not known"),
        ({"policy": "greedy"}, r"policy='greedy' is not known; use one of gain, fixed, heuristic, threshold"),
        ({"max_batch_size": 0}, r"max_batch_size=0 is not usable; it must be 1 or more"),
        ({"max_model_len": 1}, r"max_model_len=1 is not usable; this model's context allows 2 to 1024"),
        ({"max_model_len": 5000}, r"max_model_len=5000 is not usable; this model's context allows 2 to 1024"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(RequestError, match=message):
        LLM(tiny("llama"), "ngram", **options)


# Drafters


@pytest.mark.parametrize("name, nearest", [("ngrams", "ngram"), ("n-gram", "ngram"), ("non", "none")])
def test_unknown_draft_name_suggests_the_nearest(name, nearest):
    with pytest.raises(RequestError, match=rf"draft='{name}' is not known; did you mean '{nearest}'\?"):
        LLM(tiny("llama"), name)


def test_a_draft_path_that_does_not_exist():
    with pytest.raises(ModelError, match=r"draft='\./no/such/draft': no model at no/such/draft.*drafters by name: "):
        LLM(tiny("llama"), "./no/such/draft")


def test_vocabulary_mismatch_of_one_token(tmp_path, checkpoint):
    other = copy(checkpoint, tmp_path / "other")
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w57"', '"x57"'))
    with pytest.raises(VocabularyMismatchError, match=r"token 57 is 'x57' in the draft and 'w57' in the target"):
        LLM(checkpoint, other)


def test_gamma_beyond_the_probes_width(llm):
    most = llm.model.row_invariance.max_draft_tokens
    with pytest.raises(
        RequestError, match=rf"num_draft_tokens={most + 1} is not usable; it must be whole and in \[0, {most}\]"
    ):
        llm.generate([1, 2], num_draft_tokens=most + 1)
    with pytest.raises(RequestError, match=r"num_draft_tokens=-1 is not usable"):
        llm.generate([1, 2], num_draft_tokens=-1)


# Prompts


def test_a_prompt_longer_than_the_context_says_how_long(llm):
    with pytest.raises(PromptTooLongError, match=r"the prompt has 70 tokens, .* context of 64 .* at most 63 tokens"):
        llm.generate([1] * 70)
    with pytest.raises(PromptTooLongError):
        llm.generate([1] * 64)
    assert llm.generate([1] * 63).finish_reason == "length"


@pytest.mark.parametrize("prompts", [[[]], [[1, 2], []], ""])
def test_an_empty_prompt(checkpoint, prompts):
    llm = LLM(checkpoint, "none")
    with pytest.raises(RequestError, match=r"the prompt is empty; give at least one token"):
        llm.generate(prompts)
    assert not llm.engine.has_work


def test_no_prompts_give_no_results(llm):
    assert llm.generate([]) == []


@pytest.mark.parametrize("token", [160, -1])
def test_a_token_outside_the_vocabulary(llm, token):
    with pytest.raises(RequestError, match=rf"token id {token} is outside the vocabulary of 160"):
        llm.generate([1, token])


def test_text_without_a_tokenizer(llm):
    with pytest.raises(RequestError, match=r"without a tokenizer; pass tokenizer="):
        llm.generate("hello")
    with pytest.raises(RequestError, match=r"stop=\('x',\) needs a tokenizer"):
        llm.generate([1, 2], SamplingParams(stop="x"))


LONE = r"has a lone surrogate, '\\ud83d' at character 3, which no tokenizer can read; decode its source as UTF-8"


@pytest.mark.parametrize("call", ["generate", "batch", "stream", "chat", "parts", "stream_chat", "tools"])
def test_a_lone_surrogate_is_refused_everywhere(checkpoint, call):
    llm = LLM(checkpoint, "none")
    llm.tokenizer.chat_template = "{{ tools }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    bad, sound = "w1 \ud83d", {"role": "user", "content": "w1"}
    calls = {
        "generate": lambda: llm.generate(bad),
        "batch": lambda: llm.generate(["w1", bad]),
        "stream": lambda: llm.stream(bad),
        "chat": lambda: llm.chat([{"role": "user", "content": bad}]),
        "parts": lambda: llm.chat([{"role": "user", "content": [{"type": "text", "text": bad}]}]),
        "stream_chat": lambda: llm.stream_chat([{"role": "user", "content": bad}]),
        "tools": lambda: llm.chat([sound], tools=[{"name": "f", "description": bad}]),
    }
    with pytest.raises(RequestError, match=LONE):
        calls[call]()
    assert not llm.engine.has_work


def test_nothing_has_run_when_one_prompt_of_many_is_bad(llm):
    with pytest.raises(RequestError):
        llm.generate([[1, 2], [1] * 70])
    with pytest.raises(RequestError, match=r"2 sampling parameters for 1 prompts; give one, or one each"):
        llm.generate([[1, 2]], [SamplingParams()] * 2)
    assert not llm.engine.has_work


# Sampling parameters


@pytest.mark.parametrize(
    "values, wanted",
    [
        ({"temperature": -0.1}, r"temperature=-0\.1 is not usable; it must be 0 \(greedy\) or more"),
        ({"temperature": math.nan}, r"temperature=nan is not usable"),
        ({"temperature": math.inf}, r"temperature=inf is not usable"),
        ({"top_k": -1}, r"top_k=-1 is not usable; it must be 0 \(off\) or more"),
        ({"top_p": 0.0}, r"top_p=0\.0 is not usable; it must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1\.1"),
        ({"min_p": -0.2}, r"min_p=-0\.2 is not usable; it must be in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0 is not usable; it must be more than 0"),
        ({"repetition_penalty": math.inf}, r"repetition_penalty=inf is not usable"),
        ({"presence_penalty": 3.0}, r"presence_penalty=3\.0 is not usable; it must be in \[-2, 2\]"),
        ({"frequency_penalty": -3.0}, r"frequency_penalty=-3\.0"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0 is not usable; it must be 1 or more"),
        ({"seed": -1}, r"seed=-1"),
        ({"seed": 2**63}, r"seed=9223372036854775808"),
        ({"stop": ""}, r"stop=\('',\) is not usable; it must be non-empty strings"),
        ({"logprobs": -1}, r"logprobs=-1"),
        ({"logprobs": 101}, r"logprobs=101"),
        ({"verifier": "typical"}, r"verifier='typical' is not usable; it must be 'coupled' or 'rejection'"),
        ({"top_k": 5}, r"temperature=0 \(greedy\) contradicts top_k=5; set a temperature or drop the filter"),
        ({"top_p": 0.9, "min_p": 0.1}, r"contradicts top_p=0\.9, min_p=0\.1"),
    ],
)
def test_sampling_values(values, wanted):
    with pytest.raises(RequestError, match=wanted):
        SamplingParams(**values)


def test_a_bias_outside_the_vocabulary_is_found_before_anything_runs(llm):
    with pytest.raises(RequestError, match=r"logit_bias names tokens \[160, 999\]; this vocabulary has ids 0 to 159"):
        llm.generate([1, 2], SamplingParams(logit_bias={3: 1.0, 160: 1.0, 999: 2.0}))
    assert not llm.engine.has_work


# What goes wrong while it runs


class Ruins(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores * (math.nan if input_ids.shape[1] == 5 else 1.0)


def test_nan_logits(llm):
    with pytest.raises(NumericsError, match=r"the largest score at position 5 is nan: .*; load it in bfloat16"):
        llm.generate([1, 2], SamplingParams(processors=(Ruins(),)))
    assert not llm.engine.has_work
    assert len(llm.generate([1, 2], SamplingParams(max_new_tokens=4)).token_ids) == 4


def test_a_stream_is_not_hurt_by_a_failure_of_another(llm):
    params = SamplingParams(max_new_tokens=9)
    alone = llm.generate([1, 2], params).token_ids
    sound, broken = llm.stream([1, 2], params), llm.stream([1, 2], SamplingParams(processors=(Ruins(),)))
    tokens = list(next(sound).token_ids)
    with pytest.raises(NumericsError):
        for _ in broken:
            pass
    for chunk in sound:
        tokens += chunk.token_ids
    assert tokens == alone


def test_streams_may_be_read_in_any_order(llm):
    params = SamplingParams(max_new_tokens=9)
    alone = [llm.generate([1, 2 + i], params).token_ids for i in range(3)]
    streams = [llm.stream([1, 2 + i], params) for i in range(3)]
    tokens: list[list[int]] = [[], [], []]
    for turn in (0, 1, 1, 2, 0, 2, 2, 2, 1, 0):
        chunk = next(streams[turn], None)
        tokens[turn] += chunk.token_ids if chunk else ()
    for i, stream in enumerate(streams):
        for chunk in stream:
            tokens[i] += chunk.token_ids
    assert tokens == alone
    assert not llm.engine.has_work


OUT_OF_MEMORY = {
    "torch": r"the cache needs [\d.]+ GiB on cpu for 1 sequences of (128|512) tokens.*lower",
    "native": r"the cache holds [\d.]+ GiB, and a page of [\d.]+ MiB more.*lower",
}


@pytest.mark.parametrize("runtime", runtimes())
def test_cache_out_of_memory_says_how_much_and_what_to_lower(monkeypatch, runtime):
    llm = LLM(tiny("llama"), "none", runtime=runtime)
    zeros = torch.zeros

    def fails(*args, **kwargs):
        if len(args) == 3 or kwargs.get("dtype") == torch.uint8:
            raise RuntimeError("not enough memory")
        return zeros(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros" if runtime == "torch" else "empty", fails)
        with pytest.raises(CacheMemoryError, match=OUT_OF_MEMORY[runtime]):
            llm.generate([1, 2])
    assert not llm.engine.has_work
    assert len(llm.generate([1, 2], SamplingParams(max_new_tokens=3)).token_ids) == 3


def test_every_error_is_ours_and_a_python_one_too():
    assert issubclass(RequestError, ForedraftError) and issubclass(RequestError, ValueError)
    assert issubclass(CacheMemoryError, ForedraftError) and issubclass(CacheMemoryError, MemoryError)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"dtype": 5}, r"dtype=5 is not known"),
        ({"device": None}, r"device=None is not known"),
        ({"max_batch_size": "3"}, r"max_batch_size='3' is not usable"),
        ({"max_batch_size": 2.5}, r"max_batch_size=2.5 is not usable"),
        ({"max_model_len": 100.5}, r"max_model_len=100.5 is not usable"),
        ({"prefix_cache": None}, r"prefix_cache=None is not usable"),
        ({"cache_bytes": True}, r"cache_bytes=True is not usable"),
        ({"tokenizer": 5}, r"tokenizer=5 is not usable"),
        ({"policy": 5}, r"policy=5 is not usable"),
        ({"weight_format": ["int4"]}, r"weight_format=\['int4'\] is not known"),
        ({"require_exact": "no"}, r"require_exact='no' is not usable; it must be True or False"),
        ({"trust_remote_code": "no"}, r"trust_remote_code='no' is not usable"),
    ],
    ids=str,
)
def test_options_of_the_wrong_type(option, said):
    with pytest.raises(RequestError, match=said):
        LLM(tiny("llama"), "ngram", **option)


def test_dtypes_of_torch_and_seeds_of_numpy_are_taken():
    llm = LLM(tiny("llama", torch.bfloat16), "ngram", dtype=torch.bfloat16)
    ours, numpys = (SamplingParams(max_new_tokens=5, temperature=0.9, seed=seed) for seed in (3, np.int64(3)))
    assert llm.generate([1, 2, 3], ours).token_ids == llm.generate([1, 2, 3], numpys).token_ids


def test_a_misspelt_drafter_is_refused_before_the_target_is_looked_for():
    with pytest.raises(RequestError, match="did you mean 'suffix'"):
        LLM("/nowhere/llama", "sufix")


def test_a_processor_that_returns_nothing(llm):
    class Silent(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 0] = 0

    with pytest.raises(RequestError, match="Silent returned NoneType"):
        llm.generate([1, 2], SamplingParams(processors=(Silent(),)))


def test_of_several_prompts_the_error_names_the_one(llm):
    with pytest.raises(RequestError, match=r"prompts\[1\]: the prompt is empty"):
        llm.generate([[1, 2], []], SamplingParams(max_new_tokens=2))


# Names of other libraries, and what is checked before anything is loaded


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"max_tokens": 5}, "max_new_tokens"),
        ({"max_length": 5}, "max_new_tokens"),
        ({"do_sample": True}, "temperature"),
        ({"n": 2}, "in a list"),
        ({"guided_json": {}}, "structured"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"top_k": -1}, r"0 \(off\)"),
        ({"nothing_like_it": 1}, "it takes temperature, top_k"),
    ],
    ids=str,
)
def test_sampling_parameters_of_other_libraries(given, ours):
    with pytest.raises(RequestError, match=ours):
        SamplingParams(**given)


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"model": "x"}, "target"),
        ({"speculative_model": "x"}, "draft"),
        ({"max_num_seqs": 3}, "max_batch_size"),
        ({"load_in_4bit": True}, "weight_format"),
        ({"tokeniser": None}, "did you mean 'tokenizer'"),
    ],
    ids=str,
)
def test_llm_arguments_of_other_libraries(given, ours):
    with pytest.raises(RequestError, match=ours):
        LLM(**given)


@pytest.mark.parametrize("call", ["generate", "stream", "chat", "stream_chat"])
@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"sampling_params": SamplingParams()}, "use params="),
        ({"max_new_tokens": 3}, r"params=SamplingParams\(max_new_tokens=...\)"),
        ({"max_tokens": 3}, "with max_new_tokens"),
        ({"do_sample": True}, "with temperature"),
    ],
    ids=str,
)
def test_arguments_of_a_call_as_other_libraries_have_them(llm, call, given, ours):
    with pytest.raises(RequestError, match=ours):
        getattr(llm, call)([1, 2], **given)


def unread(monkeypatch) -> None:
    monkeypatch.setattr("foredraft.models.pretrained.AutoModelForCausalLM", None)


def test_a_context_that_the_model_lacks_is_noticed_before_it_is_loaded(checkpoint, monkeypatch):
    unread(monkeypatch)
    for path, runtime in ((checkpoint, "auto"), (None, "torch")):
        with pytest.raises(RequestError, match=r"max_model_len=1000000000 is not usable; this model's context allows"):
            LLM(path, "none", max_model_len=10**9, runtime=runtime)
    with pytest.raises(RequestError, match="cache_bytes=0"):
        LLM(checkpoint, "none", cache_bytes=0)


@pytest.mark.parametrize("draft", ["skip", "int4+skip", ["ngram", "skip"]], ids=str)
def test_a_profile_that_is_not_there_is_noticed_before_the_model_is_loaded(checkpoint, draft, monkeypatch):
    unread(monkeypatch)
    with pytest.raises(ModelError, match="no skip profile at nowhere"):
        LLM(checkpoint, draft, draft_profile="nowhere.json")
    with pytest.raises(ModelError, match="no skip profile at nowhere"):
        AutoModelForCausalLM.from_pretrained(checkpoint, draft="skip", draft_profile="nowhere.json")


def test_a_memory_of_another_vocabulary_is_refused():
    with pytest.raises(VocabularyMismatchError, match=r"SuffixMemory\(vocab_size=7\) cannot draft .* 160 tokens"):
        LLM(tiny("llama"), SuffixDrafter(SuffixMemory(7)))
    LLM(tiny("llama"), SuffixDrafter(SuffixMemory(160)))


def test_a_missing_extra_is_named_with_a_command_that_works_for_any_installation():
    assert missing_extra("this needs", "x", "tune") == (
        "this needs x, which is not installed; run: pip install 'foredraft[tune]'"
    )


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (b"User: hi", r"prompt b'User: hi' is bytes; give text: prompt.decode\(\)"),
        ([b"hi"], r"prompts\[0\]: the prompt b'hi' is bytes"),
        ([True, False], r"\[True, False\] is not usable; give one text, or one list of token ids"),
    ],
    ids=str,
)
def test_bytes_and_booleans_are_no_token_ids(llm, prompt, said):
    with pytest.raises(RequestError, match=said):
        llm.generate(prompt)


def test_arrays_of_token_ids_are_taken(llm):
    few = SamplingParams(max_new_tokens=3)
    wanted = llm.generate([5, 6, 7], few).token_ids
    for ids in (np.array([5, 6, 7]), torch.tensor([5, 6, 7])):
        assert llm.generate(ids, few).token_ids == wanted
        assert llm.generate([ids], few)[0].token_ids == wanted


@pytest.mark.parametrize(
    ("draft", "said"),
    [
        ("suffix,int4", r"draft='suffix,int4' is several; give a list: draft=\['suffix', 'int4'\]"),
        (["ngram", "model"], r"draft='model' is what results call a draft model; give its folder or hub name"),
    ],
    ids=str,
)
def test_names_of_drafters_as_they_are_written_elsewhere(draft, said):
    with pytest.raises(RequestError, match=said):
        LLM(tiny("llama"), draft)


def test_a_device_that_nothing_here_was_tried_on():
    with pytest.raises(RequestError, match=r"device='mps' is not known; use auto, cpu, cuda or cuda:N"):
        LLM(tiny("llama"), device="mps")


def test_numbers_beyond_any_float():
    for option in ({"temperature": 10**400}, {"logit_bias": {5: 10**400}}):
        with pytest.raises(RequestError, match="is not usable"):
            SamplingParams(**option)


def test_tools_that_are_no_list(checkpoint):
    llm = LLM(checkpoint, "none")
    for tools in (5, "search", {"name": "search"}):
        with pytest.raises(RequestError, match=r"tools=.* is not usable; give a list of functions"):
            llm.chat([{"role": "user", "content": "hi"}], tools=tools)
