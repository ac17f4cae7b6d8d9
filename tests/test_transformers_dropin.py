"""The drop-in for transformers: the same call gives the same tensors; what it cannot honour it refuses by name."""

import copy
import io
import threading
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import VOCAB, tiny
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

import foredraft
from foredraft.errors import ExactnessError, ModelError, PromptTooLongError, RequestError, UnsupportedModelError
from foredraft.integrations.draft_and_verify import base_generate, infer
from foredraft.integrations.drafting import Assisted, Drafting, IpexPolicy
from foredraft.integrations.transformers import AutoModelForCausalLM, SpeculativeModel
from foredraft.policy import Fixed, Gain
from foredraft.weights.convert import convert

NEW = 32
ARCHITECTURES = ("llama", "gpt2")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def plain(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture(scope="module")
def fast(plain: PreTrainedModel) -> SpeculativeModel:
    return foredraft.accelerate(plain, draft=near(plain), policy="fixed")


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def llama_fast(llama: PreTrainedModel) -> SpeculativeModel:
    return foredraft.accelerate(llama, draft=near(llama), policy="fixed")


def near(model: PreTrainedModel, noise: float = 0.03) -> PreTrainedModel:
    """A draft model that is right often, and wrong often enough."""
    torch.manual_seed(1)
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(noise * parameter.std(correction=0) * torch.randn_like(parameter))
    return draft


def prompts(rows: int = 1, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(pad: int = 3) -> dict[str, torch.Tensor]:
    ids, mask = prompts(3, seed=2), torch.ones(3, 12, dtype=torch.long)
    for row, width in enumerate((5, 0, 2)):
        ids[row, :width], mask[row, :width] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}


def same(plain: PreTrainedModel, fast: SpeculativeModel, inputs: Any, **options: Any) -> torch.Tensor:
    """Both decode `inputs`; the ids must be equal."""
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    expected = plain.generate(**inputs, **options)
    found = fast.generate(**inputs, **options)
    assert found.dtype == expected.dtype
    assert found.tolist() == expected.tolist()
    return found


def continuation(model: PreTrainedModel, ids: torch.Tensor, count: int = NEW) -> list[int]:
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :].tolist()


# --- the same tensors ------------------------------------------------------------------------------------------------


def test_greedy(plain: PreTrainedModel, fast: SpeculativeModel) -> None:
    same(plain, fast, prompts(), max_new_tokens=NEW, do_sample=False)
    assert 0 < fast.n_matched < fast.n_drafted  # some drafts were right and some were wrong


@pytest.mark.parametrize("draft", [None, "ngram"])
def test_loaded_from_a_folder(plain: PreTrainedModel, draft: str | None, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, speculative=draft is not None, draft=draft, policy="fixed")
    assert (loaded.device.type, loaded.dtype) == ("cpu", torch.float32)
    assert loaded.config.model_type == plain.config.model_type
    same(plain, loaded, prompts(2), max_new_tokens=NEW, do_sample=False)
    assert draft is None or loaded.n_drafted > 0
    assert draft is not None or loaded.n_drafted == 0


def test_a_draft_folder(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "target")
    near(llama).save_pretrained(tmp_path / "draft")
    folders = {"draft": tmp_path / "draft", "speculative": True, "policy": "fixed"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target", **folders)
    same(llama, loaded, prompts(), max_new_tokens=NEW)
    assert loaded.n_matched > 0


def test_end_of_sequence(plain: PreTrainedModel, fast: SpeculativeModel) -> None:
    ids = prompts(seed=3)
    text = continuation(plain, ids)
    for eos in (text[7], [text[9], text[5], 2], [text[0]]):
        found = same(plain, fast, ids, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=0)
        assert found.shape[1] < 12 + NEW


def test_left_padded_batch(plain: PreTrainedModel, fast: SpeculativeModel) -> None:
    found = same(plain, fast, padded(), max_new_tokens=NEW, eos_token_id=list(range(8, 24)), pad_token_id=3)
    assert (found[:, -1] == 3).any() or found.shape[1] == 12 + NEW
    assert found[0, :5].tolist() == [3] * 5


def test_the_mask_is_inferred_from_the_pad_token(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    ids = padded()["input_ids"]
    same(llama, llama_fast, ids, max_new_tokens=NEW, eos_token_id=9, pad_token_id=3)


def test_a_hole_in_the_mask(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    inputs = padded()
    inputs["attention_mask"][1, 4:6] = 0
    same(llama, llama_fast, inputs, max_new_tokens=NEW, pad_token_id=3)


def test_more_rows_than_run_at_once(llama: PreTrainedModel) -> None:
    few = foredraft.accelerate(llama, draft="ngram", max_batch_size=2)
    same(llama, few, prompts(5), max_new_tokens=12)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 20},
        {"max_new_tokens": 1},
        {"max_new_tokens": NEW, "min_new_tokens": 20, "eos_token_id": list(range(4, 80)), "pad_token_id": 3},
        {"max_new_tokens": NEW, "min_length": 30, "eos_token_id": list(range(4, 80)), "pad_token_id": 3},
        {"max_new_tokens": NEW, "repetition_penalty": 1.3},
        {"max_new_tokens": NEW, "no_repeat_ngram_size": 2},
        {"max_new_tokens": NEW, "bad_words_ids": [[5], [9, 12]]},
        {"max_new_tokens": NEW, "suppress_tokens": list(range(30, 90))},
        {"max_new_tokens": NEW, "begin_suppress_tokens": list(range(4, 120))},
        {"max_new_tokens": NEW, "sequence_bias": [[[7], 9.0], [[7, 8], -40.0]], "repetition_penalty": 1.2},
        {"max_new_tokens": 12, "forced_eos_token_id": 9, "eos_token_id": 9, "pad_token_id": 3},
        {"max_new_tokens": NEW, "eos_token_id": 9, "pad_token_id": 3, "exponential_decay_length_penalty": (4, 1.5)},
        {"max_new_tokens": NEW, "renormalize_logits": True, "remove_invalid_values": True},
        {"max_new_tokens": NEW, "generation_config": GenerationConfig(repetition_penalty=1.3)},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(llama: PreTrainedModel, llama_fast: SpeculativeModel, options: dict[str, Any]) -> None:
    same(llama, llama_fast, padded(), do_sample=False, **options)


def test_a_generation_config(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    config = GenerationConfig(max_new_tokens=20, eos_token_id=[9, 10, 11], pad_token_id=3, repetition_penalty=1.2)
    before = config.to_dict()
    same(llama, llama_fast, padded(), generation_config=config)
    assert config.to_dict() == before


def test_the_checkpoints_own_defaults(tmp_path: Path) -> None:
    model = tiny("llama")
    eos = continuation(model, prompts())[6]
    model.generation_config = GenerationConfig(eos_token_id=[eos], pad_token_id=1, max_new_tokens=24, top_k=7)
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, draft="ngram")
    assert loaded.generation_config.top_k == 7
    same(model, loaded, prompts(), do_sample=False, top_k=50)
    a, b = (loaded.generate(prompts(seed=4), seed=seed).tolist() for seed in (1, 2))
    assert a != b  # the checkpoint says that it samples
    loaded.generation_config.do_sample, model.generation_config.do_sample = False, False
    loaded.generation_config.top_k, model.generation_config.top_k = None, None
    same(model, loaded, prompts())


def test_several_return_sequences(llama_fast: SpeculativeModel) -> None:
    found = llama_fast.generate(prompts(2), do_sample=True, num_return_sequences=3, max_new_tokens=8, seed=5)
    assert found.shape == (6, 20)
    assert len({tuple(row) for row in found.tolist()}) == 6


def test_a_dictionary_is_returned(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    found = llama_fast.generate(prompts(), max_new_tokens=8, return_dict_in_generate=True)
    assert found.sequences.tolist() == llama.generate(prompts(), max_new_tokens=8).tolist()


def test_begins_from_bos(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    expected = llama.generate(bos_token_id=5, max_new_tokens=8)
    assert llama_fast.generate(bos_token_id=5, max_new_tokens=8).tolist() == expected.tolist()


# --- processors, criteria, streamers ---------------------------------------------------------------------------------


class Forbid(LogitsProcessor):
    """Depends on the whole prefix and its length: wrong prefixes change the text."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, (input_ids.sum(-1) + input_ids.shape[1]) % VOCAB] = -torch.inf  # in place, as many do
        scores[:, : VOCAB // 2 : 1 + input_ids.shape[1] % 3] -= 2.0
        return scores


class Seen(StoppingCriteria):
    """Remembers every prefix, and ends the text at one of some tokens."""

    def __init__(self, *stops: int, scalar: bool = False) -> None:
        self.stops, self.scalar = stops, scalar
        self.prefixes: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.prefixes.append(input_ids.tolist())
        assert scores is None
        if self.scalar:
            return input_ids[0][-1].item() in self.stops
        return torch.isin(input_ids[:, -1], torch.tensor(self.stops))


class Puts:
    """A streamer that remembers what it was given."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.values.append("end")


def test_a_custom_processor(plain: PreTrainedModel, fast: SpeculativeModel) -> None:
    unprocessed = plain.generate(prompts(), max_new_tokens=NEW)
    found = same(plain, fast, prompts(), max_new_tokens=NEW, logits_processor=[Forbid()])
    assert found.tolist() != unprocessed.tolist()


def test_a_custom_processor_sees_the_padding(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    """Forbid takes one token from all rows; here each row has its own."""

    class Own(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            out = scores.clone()
            rows = torch.arange(len(scores))
            out[rows, (input_ids[:, 0] + input_ids.sum(-1) + input_ids.shape[1]) % VOCAB] += 6.0
            return out

    same(llama, llama_fast, padded(), max_new_tokens=NEW, logits_processor=[Own()], pad_token_id=3)


def test_allowed_tokens_know_their_row(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return list(range(10 + 40 * row, 50 + 40 * row - len(ids) % 5))

    same(llama, llama_fast, padded(), max_new_tokens=NEW, prefix_allowed_tokens_fn=allowed, pad_token_id=3)


@pytest.mark.parametrize("scalar", [False, True])
def test_stopping_criteria_see_every_prefix(plain: PreTrainedModel, fast: SpeculativeModel, scalar: bool) -> None:
    ids = prompts(seed=3)
    text = continuation(plain, ids)
    for position in range(0, 12, 3):
        theirs, ours = Seen(text[position], scalar=scalar), Seen(text[position], scalar=scalar)
        expected = plain.generate(ids, max_new_tokens=NEW, stopping_criteria=[theirs])
        found = fast.generate(ids, max_new_tokens=NEW, stopping_criteria=[ours])
        assert found.tolist() == expected.tolist()
        assert ours.prefixes == theirs.prefixes


@pytest.mark.parametrize("eos", [None, 9])
def test_stopping_criteria_in_a_batch(llama: PreTrainedModel, llama_fast: SpeculativeModel, eos: int | None) -> None:
    """Without an end-of-sequence token transformers lets the rows that have ended go on until all have."""
    text = llama.generate(**padded(), max_new_tokens=NEW, pad_token_id=3)[:, 12:]
    for position in ((3, 9, 6), (0, 0, 0), (12, 1, 2)):
        stops = [int(text[row, at]) for row, at in enumerate(position)]
        same(
            llama,
            llama_fast,
            padded(),
            max_new_tokens=NEW,
            stopping_criteria=[Seen(*stops)],
            eos_token_id=eos,
            pad_token_id=3,
        )


def test_max_time_ends_the_text(llama_fast: SpeculativeModel) -> None:
    assert llama_fast.generate(prompts(), max_new_tokens=500, max_time=0.0).shape == (1, 13)


@pytest.mark.parametrize("rows", [1, 3])
def test_streamers_get_the_same(llama: PreTrainedModel, llama_fast: SpeculativeModel, rows: int) -> None:
    theirs, ours = Puts(), Puts()
    inputs = {name: value[:rows] for name, value in padded().items()}
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": list(range(8, 24)), "pad_token_id": 3}
    llama.generate(**inputs, **options, streamer=theirs)
    llama_fast.generate(**inputs, **options, streamer=ours)
    assert ours.values == theirs.values


def test_a_streamer_that_fails_leaves_nothing_behind(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    class Full(Puts):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.values) > 5:
                raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        llama_fast.generate(prompts(), max_new_tokens=NEW, streamer=Full())
    assert not llama_fast.engine.has_work
    same(llama, llama_fast, prompts(), max_new_tokens=NEW)


def tokenizer() -> PreTrainedTokenizerFast:
    """Every id is a character; the space is one of them."""
    characters = [" ", *map(chr, range(33, 127)), *map(chr, range(0xA1, 0xA1 + VOCAB - 95))]
    inner = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)


def test_text_streamers(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    printed = []
    for model in (llama, llama_fast):
        with redirect_stdout(io.StringIO()) as out:
            model.generate(prompts(), max_new_tokens=NEW, streamer=TextStreamer(tokenizer()))
        printed.append(out.getvalue())
    assert printed[0] == printed[1] != ""


def test_a_text_iterator_in_a_thread(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=30)
    options: dict[str, Any] = {"inputs": prompts(), "max_new_tokens": NEW, "streamer": streamer}
    thread = threading.Thread(target=llama_fast.generate, kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer().decode(continuation(llama, prompts()))


def test_stop_strings(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    words = tokenizer()
    stop = words.decode(continuation(llama, prompts())[6:8])
    options: dict[str, Any] = {"stop_strings": [stop], "tokenizer": words, "max_new_tokens": NEW}
    same(llama, llama_fast, prompts(), **options)
    with pytest.raises(ValueError, match="tokenizer"):
        llama_fast.generate(prompts(), stop_strings=[stop], max_new_tokens=NEW)


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 0, "min_p": 0.05, "repetition_penalty": 1.1},
        {"top_k": 0, "typical_p": 0.8},
        {"top_k": 30, "epsilon_cutoff": 0.01, "temperature": 0.8},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_seed_gives_the_same_text_with_and_without_drafting(
    plain: PreTrainedModel, fast: SpeculativeModel, options: dict[str, Any]
) -> None:
    plainly = foredraft.accelerate(plain, draft=None)
    a, b = (m.generate(prompts(2), do_sample=True, max_new_tokens=NEW, seed=7, **options) for m in (plainly, fast))
    assert a.tolist() == b.tolist()
    assert fast.n_matched > 0
    c = fast.generate(prompts(2), do_sample=True, max_new_tokens=NEW, seed=8, **options)
    assert c.tolist() != a.tolist()


def test_torchs_seed_counts_where_none_is_given(llama_fast: SpeculativeModel) -> None:
    texts = []
    for seed in (3, 3, 4):
        transformers.set_seed(seed)
        texts.append(llama_fast.generate(prompts(), do_sample=True, max_new_tokens=NEW).tolist())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("options", [{"temperature": 0.7, "top_k": 5}, {"top_k": 0, "typical_p": 0.5}])
def test_the_first_token_follows_transformers_distribution(
    llama: PreTrainedModel, llama_fast: SpeculativeModel, options: dict[str, Any]
) -> None:
    ids, count = prompts(), 400
    asked = {"do_sample": True, "max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    p = llama.generate(ids, **asked, **options).scores[0][0].softmax(-1)
    out = llama_fast.generate(ids, do_sample=True, max_new_tokens=1, num_return_sequences=count, seed=1, **options)
    found = torch.bincount(out[:, -1], minlength=VOCAB) / count
    assert not found[p == 0].any()
    assert (found - p).abs().sum() / 2 < 0.1


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("num_beam_groups", 2),
        ("constraints", ["x"]),
        ("force_words_ids", [[1]]),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("guidance_scale", 1.5),
        ("token_healing", True),
        ("output_scores", True),
        ("output_logits", True),
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("inputs_embeds", torch.zeros(1, 2, 3)),
        ("past_key_values", object()),
        ("cache", object()),
        ("position_ids", torch.zeros(1, 12)),
        ("use_cache", False),
        ("cache_implementation", "static"),
        ("assistant_early_exit", 2),
        ("assistant_tokenizer", object()),
        ("custom_generate", "somebody/repo"),
        ("negative_prompt_ids", torch.ones(1, 2)),
        ("use_mtp", True),
        ("speculation_type", "dflash"),
        ("assistant_ensemble_weight", 0.5),
        ("th_batch_num", 4),
        ("num_assistant_tokens", 0),
        ("num_assistant_tokens", 10**6),
        ("num_assistant_tokens_schedule", "often"),
        ("assistant_confidence_threshold", 1.5),
        ("max_matching_ngram_size", 3),
        ("lookahead", -1),
        ("num_draft_tokens", 10**6),
        ("max_step_draft", 10**6),
        ("th_stop_draft", 7),
        ("auto_parameters", [4, 0.5, 0.9, 1e-2, 0.9]),
        ("seed", -1),
        ("seed", True),
        ("verifier", "none"),
        ("temperature", 0.0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(llama_fast: SpeculativeModel, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        llama_fast.generate(prompts(), max_new_tokens=4, do_sample=name == "temperature", **{name: value})
    assert not llama_fast.engine.has_work


def test_refused_in_a_configuration(llama_fast: SpeculativeModel) -> None:
    with pytest.raises(RequestError, match="num_beams=3 cannot be honoured"):
        llama_fast.generate(prompts(), generation_config=GenerationConfig(num_beams=3, max_new_tokens=4))


def test_unknown_options_raise_as_in_transformers(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    for model in (llama, llama_fast):
        with pytest.raises(ValueError, match="max_new_token"):
            model.generate(prompts(), max_new_token=4)
        with pytest.raises(ValueError, match="token_type_ids"):
            model.generate(prompts(), max_new_tokens=4, token_type_ids=prompts())


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3, "lookahead": 3},
        {"assistant_model": "m", "prompt_lookup_num_tokens": 3},
        {"num_assistant_tokens": 3, "max_step_draft": 3},
        {"lookahead": 3, "th_stop_draft": 0.5},
    ],
)
def test_contradictions_are_refused(llama_fast: SpeculativeModel, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r" and |different rules"):
        llama_fast.generate(prompts(), max_new_tokens=4, **options)


def test_prompts_that_cannot_be_decoded(llama_fast: SpeculativeModel) -> None:
    right = {"input_ids": prompts(), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    right["attention_mask"][0, -1] = 0
    with pytest.raises(RequestError, match="ends with 0"):
        llama_fast.generate(**right, max_new_tokens=4)
    with pytest.raises(RequestError, match="no token"):
        llama_fast.generate(prompts(), attention_mask=torch.zeros(1, 12, dtype=torch.long), max_new_tokens=4)
    with pytest.raises(PromptTooLongError, match="at most max_new_tokens=1012"):
        llama_fast.generate(prompts(), max_new_tokens=1013)
    with pytest.raises(RequestError, match="outside the vocabulary"):
        llama_fast.generate(torch.tensor([[VOCAB]]), max_new_tokens=4)
    with pytest.raises(ValueError, match="max_length"):
        llama_fast.generate(prompts(), max_length=5)


def test_rows_of_different_length_need_a_pad_token(llama_fast: SpeculativeModel) -> None:
    class Ends(Seen):
        eos_token_id = None

    with pytest.raises(RequestError, match="pad_token_id=None"):
        llama_fast.generate(prompts(3), max_new_tokens=NEW, stopping_criteria=[Ends(*range(40))])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_in_low_bit": "sym_int4"}, "load_in_low_bit='sym_int4'"),
        ({"load_in_4bit": True}, "load_in_4bit=True cannot be honoured"),
        ({"load_in_8bit": True}, "load_in_8bit=True cannot be honoured"),
        ({"load_in_low_bit": "bf16", "torch_dtype": torch.float32}, "contradict"),
        ({"optimize_model": False}, "optimize_model=False"),
        ({"use_cache": False}, "use_cache=False"),
        ({"speculative": False, "draft": "ngram"}, "speculative=False contradicts"),
    ],
)
def test_loading_options_refused(llama: PreTrainedModel, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path, **options)


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "nothing", draft="ngram")


def test_an_unknown_loading_option(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="gibberish"):
        AutoModelForCausalLM.from_pretrained(tmp_path, draft="ngram", gibberish=1)


def test_a_model_that_cannot_be_rewound() -> None:
    from models import mamba

    with pytest.raises(UnsupportedModelError, match="mamba"):
        foredraft.accelerate(mamba(), draft=None)


def test_a_low_bit_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("low") / "int4"
    convert(checkpoint, folder, "int4")
    with pytest.raises(RequestError, match=r"speculative=True .* holds low-bit weights already"):
        AutoModelForCausalLM.from_pretrained(folder, speculative=True)
    with pytest.raises(RequestError, match="revision cannot be honoured"):
        AutoModelForCausalLM.from_pretrained(folder, revision="main")
    plainly = AutoModelForCausalLM.from_pretrained(folder, speculative=False)
    drafting = AutoModelForCausalLM.from_pretrained(folder)
    assert drafting.engine.drafter.name == "ngram"
    ids = prompts(2).repeat(1, 3)
    expected = plainly.generate(ids, max_new_tokens=NEW)
    options = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    assert drafting.generate(ids, max_new_tokens=NEW, **options).tolist() == expected.tolist()
    assert drafting.n_drafted > 0


# --- drafting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, None),
        ({"num_assistant_tokens": 4}, Assisted),
        ({"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "heuristic"}, Assisted),
        ({"num_assistant_tokens_schedule": "heuristic_transient"}, Assisted),
        ({"assistant_confidence_threshold": 0.4}, Assisted),
        ({"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}, Assisted),
        ({"lookahead": 3}, Gain),
        ({"num_draft_tokens": 0}, Fixed),
        ({"verifier": "coupled", "num_draft_tokens": 7}, Fixed),
        ({"max_step_draft": 6, "th_stop_draft": 0.6, "auto_th_stop_draft": True}, IpexPolicy),
        ({"auto_parameters": [1, 0.5, 0.9, 1e-2, 0.9], "min_step_draft": 2, "hf_adjust": True}, IpexPolicy),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("sampled", [False, True])
def test_drafting_options_change_no_token(
    llama_fast: SpeculativeModel, options: dict[str, Any], kind: type | None, sampled: bool
) -> None:
    usual = llama_fast.engine.drafter, llama_fast.engine.policy
    asked: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": sampled, "seed": 3}
    expected = llama_fast.generate(prompts(2), **asked)
    assert llama_fast.generate(prompts(2), **asked, **options).tolist() == expected.tolist()
    assert usual == (llama_fast.engine.drafter, llama_fast.engine.policy)
    policy = Drafting.take({**options}).policy(31)
    assert policy is None if kind is None else type(policy) is kind


def test_longest_drafts_are_as_asked(llama_fast: SpeculativeModel) -> None:
    for options in ({"num_assistant_tokens": 3}, {"max_step_draft": 3, "th_stop_draft": 0.0}):
        llama_fast.generate(prompts(), max_new_tokens=NEW, **options)
        assert max(llama_fast.draft_num) == 3


def test_a_confidence_threshold_shortens_drafts(llama_fast: SpeculativeModel) -> None:
    def longest(threshold: float) -> int:
        options = {"num_assistant_tokens": 8, "assistant_confidence_threshold": threshold}
        llama_fast.generate(prompts(), max_new_tokens=NEW, **options)
        return max(llama_fast.draft_num)

    assert longest(1.0) == 1  # the token that fell short is kept
    assert longest(0.0) == 8


def test_an_assistant_is_made_once(llama: PreTrainedModel) -> None:
    plainly = foredraft.accelerate(llama, draft=None)
    assistant = near(llama, 0.01)
    for given in (assistant, assistant, foredraft.accelerate(near(llama), draft=None)):
        same_ids = plainly.generate(prompts(), max_new_tokens=NEW, assistant_model=given, num_assistant_tokens=4)
        assert same_ids.tolist() == llama.generate(prompts(), max_new_tokens=NEW).tolist()
        assert plainly.n_matched > 0
    assert len(plainly._choices._drafters) == 2
    plainly.generate(prompts(), max_new_tokens=NEW)
    assert plainly.n_drafted == 0


def test_prompt_lookup_from_a_configuration(llama: PreTrainedModel) -> None:
    plainly = foredraft.accelerate(llama, draft=None)
    config = GenerationConfig(prompt_lookup_num_tokens=4, max_matching_ngram_size=1, max_new_tokens=NEW)
    ids = prompts().repeat(1, 3)
    expected = llama.generate(ids, max_new_tokens=NEW)
    assert plainly.generate(ids, generation_config=config).tolist() == expected.tolist()
    assert plainly.n_drafted > 0
    assert plainly.generate(ids.repeat(2, 1), generation_config=config)[1].tolist() == expected[0].tolist()


def test_statistics(llama: PreTrainedModel) -> None:
    model = foredraft.accelerate(llama, draft=near(llama), policy="fixed")
    model.generate(prompts(), max_new_tokens=NEW)
    rounds = len(model.generate_time)
    lists = (model.draft_time, model.verify_time, model.draft_num, model.accept_num)
    assert {len(values) for values in lists} == {rounds}
    assert model.n_token_generated == NEW == 1 + sum(model.accept_num)
    assert model.n_drafted == sum(model.draft_num)
    assert (
        model.n_matched == NEW - 1 - rounds or model.n_matched == NEW - rounds
    )  # the last round may lack its own token
    assert model.first_token_time > 0
    assert model.e2e_time_without_first == pytest.approx(sum(model.generate_time))
    assert model.stats.output_tokens == NEW
    model.clear_benchmarks()
    assert (model.n_drafted, model.draft_num, model.first_token_time) == (0, [], 0.0)


# --- the objects -----------------------------------------------------------------------------------------------------


def test_an_accelerated_model_is_left_as_it_was(request: pytest.FixtureRequest) -> None:
    for name in (*ARCHITECTURES, "mixtral"):
        model = tiny(name).train()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        kinds = [type(module) for module in model.modules()]
        attention = model.config._attn_implementation
        fast = foredraft.accelerate(model, draft="ngram")
        fast.generate(prompts(), max_new_tokens=8)
        assert model.training
        assert kinds == [type(module) for module in model.modules()]
        assert model.config._attn_implementation == attention
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        model.eval()
        assert torch.equal(fast(prompts()).logits, model(prompts()).logits)
        same(model, fast, prompts(), max_new_tokens=8)


def test_moving(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, draft="ngram")
    assert loaded.to("cpu") is loaded and loaded.eval() is loaded and loaded.float() is loaded
    expected = loaded.generate(prompts(), max_new_tokens=8)
    assert loaded.bfloat16().dtype == torch.bfloat16
    assert loaded.to(torch.float32).generate(prompts(), max_new_tokens=8).tolist() == expected.tolist()
    with pytest.raises(RequestError, match="forward"):
        loaded(prompts())
    with pytest.raises(AttributeError, match="lm_head"):
        _ = loaded.lm_head
    accelerated = foredraft.accelerate(llama, draft=None)
    assert accelerated.lm_head is llama.lm_head
    with pytest.raises(RequestError, match="object in memory"):
        accelerated.to(torch.bfloat16)


def test_in_a_pipeline(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    pipe = transformers.pipeline("text-generation", model=llama_fast, tokenizer=tokenizer())
    found = pipe("a story", max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = tokenizer()("a story", return_tensors="pt").input_ids
    assert found == tokenizer().decode(continuation(llama, ids, 8), skip_special_tokens=True)


def test_generate_within_generate(llama_fast: SpeculativeModel) -> None:
    class Nested(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
            return llama_fast.generate(input_ids, max_new_tokens=2)

    with pytest.raises(RequestError, match="within"):
        llama_fast.generate(prompts(), max_new_tokens=4, stopping_criteria=[Nested()])


def test_a_processor_that_raises_is_heard(llama_fast: SpeculativeModel) -> None:
    class Fails(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        llama_fast.generate(prompts(), max_new_tokens=4, logits_processor=[Fails()])
    assert llama_fast.generate(prompts(), max_new_tokens=4).shape[1] == prompts().shape[1] + 4


def test_a_watermark_that_counts_its_calls_is_refused(llama_fast: SpeculativeModel) -> None:
    mark = transformers.SynthIDTextWatermarkingConfig(keys=[1, 2, 3, 9], ngram_len=3)
    with pytest.raises(RequestError, match=r"watermarking_config=SynthID.* cannot be honoured"):
        llama_fast.generate(prompts(), max_new_tokens=4, watermarking_config=mark)


def test_a_processor_that_counts_its_calls_is_an_error_and_not_another_text(llama_fast: SpeculativeModel) -> None:
    class Counts(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return scores.roll(self.calls, -1)

    with pytest.raises(ExactnessError, match="Counts answers differently"):
        llama_fast.generate(prompts(), max_new_tokens=NEW, logits_processor=[Counts()])


def test_threads_take_turns(llama: PreTrainedModel, llama_fast: SpeculativeModel) -> None:
    found: dict[int, list[list[int]]] = {}

    def run(seed: int) -> None:
        found[seed] = llama_fast.generate(prompts(seed=seed), max_new_tokens=NEW).tolist()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: llama.generate(prompts(seed=seed), max_new_tokens=NEW).tolist() for seed in range(4)}


def test_the_default_draft_is_the_model_itself(plain: PreTrainedModel, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, speculative=True, policy="fixed")
    assert loaded.engine.drafter.name == foredraft.accelerate(plain).engine.drafter.name == "int4"
    same(plain, loaded, padded(), max_new_tokens=NEW, pad_token_id=3)
    assert 0 < loaded.n_matched < loaded.n_drafted


# --- the reference systems' own examples, with our import ------------------------------------------------------------

IPEX_EXAMPLE = """
import time
import torch
from foredraft.integrations.transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(model_path,
                                             optimize_model=True,
                                             torch_dtype=torch.bfloat16,
                                             load_in_low_bit="bf16",
                                             speculative=True,
                                             trust_remote_code=True,
                                             use_cache=True)
tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=True)

with torch.inference_mode():
    inputs = tokenizer(prompt, return_tensors="pt")
    input_ids = inputs.input_ids.to(model.device)
    attention_mask = inputs.attention_mask.to(model.device)
    # warm-up
    output = model.generate(input_ids, max_new_tokens=n_predict, attention_mask=attention_mask, do_sample=False)

    st = time.perf_counter()
    output = model.generate(input_ids, max_new_tokens=n_predict, attention_mask=attention_mask, do_sample=False)
    output_str = tokenizer.decode(output[0], skip_special_tokens=True)
    end = time.perf_counter()

    print(f"E2E Generation time {(end - st):.4f}s")
    print(output_str)
    print(f"Tokens generated {model.n_token_generated}")
    print(f"First token latency {model.first_token_time:.4f}s")

    sampled = model.generate(input_ids, max_new_tokens=n_predict, do_sample=True, top_k=20, top_p=0.9, temperature=0.7,
                             max_step_draft=8, th_stop_draft=0.8, auto_th_stop_draft=True, hf_adjust=False)
    looked_up = model.generate(input_ids, max_new_tokens=n_predict, lookahead=3, max_matching_ngram_size=2)
"""

DRAFT_AND_VERIFY_EXAMPLE = """
import torch
from foredraft.integrations.draft_and_verify import LlamaForCausalLM, infer
from transformers import AutoTokenizer

model = LlamaForCausalLM.from_pretrained(model_path, torch_dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = model.to("cpu").eval()
model.set_skip_layers([1], [1])
skipped = model.get_skip_layers()

result_base = infer(model, tokenizer, prompt, generate_fn="base", max_new_tokens=24, do_sample=False, early_stop=True)
result_essg = infer(model, tokenizer, prompt, generate_fn="essg", max_new_tokens=24, early_stop=True,
                    max_step_draft=12, th_stop_draft=0.60, auto_th_stop_draft=True,
                    auto_parameters=[1, 0.50, 0.90, 1e-2, 0.90], do_sample=False, do_sample_draft=False)
again = infer(model, tokenizer, prompt, generate_fn="essg", max_new_tokens=24, early_stop=True,
              max_step_draft=12, th_stop_draft=result_essg["th_stop_draft"])
sampled = {name: infer(model, tokenizer, prompt, generate_fn=name, max_new_tokens=24, do_sample=True, top_p=0.95,
                       temperature=0.6) for name in ("base", "essg", "sss")}
"""


@pytest.fixture
def checkpoint(llama: PreTrainedModel, tmp_path: Path) -> Path:
    llama.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def run(example: str, **names: Any) -> dict[str, Any]:
    exec(compile(example, "example", "exec"), names)
    return names


def test_ipex_example(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(IPEX_EXAMPLE, model_path=str(checkpoint), prompt="a long story", n_predict=NEW)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.bfloat16, speculative=False)
    expected = plain.generate(found["input_ids"], max_new_tokens=NEW)
    assert found["model"].dtype == torch.bfloat16
    assert found["output"].tolist() == found["looked_up"].tolist() == expected.tolist()
    assert found["sampled"].shape == expected.shape
    assert f"Tokens generated {NEW}" in capsys.readouterr().out


def test_draft_and_verify_example(checkpoint: Path, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREDRAFT_CACHE", str(checkpoint / "cache"))
    found = run(DRAFT_AND_VERIFY_EXAMPLE, model_path=str(checkpoint), prompt="a long story")
    base, essg = found["result_base"], found["result_essg"]
    ids = found["tokenizer"]("a long story", return_tensors="pt").input_ids
    assert base["generate_ids"][0].tolist() == continuation(llama, ids, 24)
    assert essg["generate_ids"].tolist() == base["generate_ids"].tolist() == found["again"]["generate_ids"].tolist()
    assert (essg["completion"], found["skipped"]) == (base["completion"], ((1,), (1,)))
    assert 0 <= essg["matchness"] <= 1 and essg["num_drafted_tokens"] > 0 and essg["time"] > 0
    assert essg["th_stop_draft"] != 0.6  # it adapted
    sampled = {name: result["generate_ids"].tolist() for name, result in found["sampled"].items()}
    assert sampled["base"] == sampled["essg"]
    assert len(sampled["sss"][0]) == 24


def test_draft_and_verify_refusals(llama_fast: SpeculativeModel) -> None:
    words = tokenizer()
    with pytest.raises(RequestError, match="generate_fn='fast' is not known"):
        infer(llama_fast, words, "a", generate_fn="fast")
    with pytest.raises(RequestError, match=r"th_random_draft=0\.5"):
        infer(llama_fast, words, "a", generate_fn="sss", th_random_draft=0.5)
    skipping = foredraft.accelerate(tiny("llama"), draft=None)
    with pytest.raises(ModelError, match="names layer 7"):
        skipping.set_skip_layers([7], [])
    skipping.set_skip_layers([0], [])
    assert skipping.get_skip_layers() == ((0,), ())


def test_the_end_of_sequence_is_a_token_without_early_stop(llama: PreTrainedModel) -> None:
    words = tokenizer()
    ids = prompts()
    words.eos_token = words.convert_ids_to_tokens(continuation(llama, ids)[3])
    model = foredraft.accelerate(llama, draft=None)
    lengths = [base_generate(model, words, ids, 10, early_stop=stop)["generate_ids"].shape[1] for stop in (True, False)]
    assert lengths == [4, 10]


def test_skipped_layers_survive_a_move(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, speculative=False)
    model.set_skip_layers([1], [])
    assert model.to(torch.bfloat16).get_skip_layers() == ((1,), ())
    model.generate(prompts(), max_new_tokens=4, num_draft_tokens=2)
    assert model.n_drafted > 0
