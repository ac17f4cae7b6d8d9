"""Draft models with another tokenizer: the text is that of plain decoding, and what can be shared is."""

import logging
import random
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers_of_bytes as made
import torch
import transformers as t
from models import ROPE
from transformers import PreTrainedTokenizerFast

from foredraft import LLM, SamplingParams, Structured
from foredraft.diagnosis import serving
from foredraft.drafters.model import ModelDrafter
from foredraft.drafters.several import Several
from foredraft.drafters.translated import Reading, TranslatingDrafter
from foredraft.drafters.vocabulary import Overlap, Translation
from foredraft.errors import ModelError, VocabularyMismatchError
from foredraft.models.pages import PAGE, PageCache
from foredraft.native import library
from foredraft.policy import Fixed
from foredraft.text.spelling import Speller
from foredraft.tuning import pipeline
from foredraft.tuning.options import TuneOptions
from foredraft.tuning.report import lines
from foredraft.types import Request

PROMPTS = ["the cat sat", "a small café in Zürich sells 寿", " two  spaces", "😀 cakes, “hello”", "<end> is text?", "x"]
PARAMS = SamplingParams(max_new_tokens=40, ignore_eos=True)
SETTINGS = (
    PARAMS,
    replace(PARAMS, temperature=0.8),
    replace(PARAMS, temperature=1.0, top_p=0.9, repetition_penalty=1.2, presence_penalty=0.3),
    replace(PARAMS, temperature=0.9, top_k=20, logit_bias={70: 3.0}),
)
ORDER = random.Random(0).sample(range(256), 256)


def save(folder: Path, tokenizer: PreTrainedTokenizerFast | None, size: int, seed: int, order=None, off=0.0) -> Path:
    """A tiny random model with its tokenizer; `order` gives its tables' rows other ids, `off` disturbs its head."""
    torch.manual_seed(seed)
    model = t.LlamaForCausalLM(t.LlamaConfig(**ROPE | {"vocab_size": size}))
    if off:
        model.lm_head.weight.data += off * torch.randn_like(model.lm_head.weight)
    if order is not None:
        for table in (model.model.embed_tokens, model.lm_head):
            table.weight.data[order] = table.weight.data.clone()
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Models with a byte-level tokenizer, and with one of the other kind."""
    root = tmp_path_factory.mktemp("two")
    ours, theirs = made.byte_level(), made.byte_fallback()
    return save(root / "bytes", ours, len(ours), 0), save(root / "pieces", theirs, len(theirs) + 3, 1)


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory) -> tuple[Path, Path]:
    """One model twice, the second time with its tokens in another order."""
    root = tmp_path_factory.mktemp("shuffled")
    return (
        save(root / "one", made.of_size(256), 256, 0),
        save(root / "other", made.of_size(256, ORDER), 256, 0, torch.tensor(ORDER)),
    )


def translating(llm: LLM) -> TranslatingDrafter:
    assert isinstance(llm.drafter, TranslatingDrafter)
    return llm.drafter


# --- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", (1, 4))
@pytest.mark.parametrize("swapped", (False, True))
def test_texts_are_those_of_plain_decoding(folders, swapped, batch):
    target, draft = reversed(folders) if swapped else folders
    llm = LLM(target, draft, max_batch_size=batch, policy="fixed")
    prompts = [prompt for prompt in PROMPTS for _ in SETTINGS]
    asked = [replace(params, seed=i) for i, params in enumerate(SETTINGS * len(PROMPTS))]
    drafted = llm.generate(prompts, asked)
    plain = llm.generate(prompts, asked, num_draft_tokens=0)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    assert [r.text for r in drafted] == [r.text for r in plain]
    assert sum(r.stats.drafted for r in drafted) > 500
    assert not translating(llm).readings  # all ended, and nothing was kept


def test_a_stop_string_and_an_end_within_a_draft(shuffled):
    llm = LLM(*shuffled, policy="fixed")
    plain = llm.generate([65, 66, 67], PARAMS, num_draft_tokens=0)
    text, at = plain.text, len(plain.text) // 2
    params = (replace(PARAMS, stop=text[at : at + 3]), replace(PARAMS, stop_token_ids=(plain.token_ids[at],)))
    for own in params:
        expected = llm.generate([65, 66, 67], own, num_draft_tokens=0)
        found = llm.generate([65, 66, 67], own)
        assert found.stats.accepted and found.finish_reason == "stop"
        assert (found.text, found.token_ids) == (expected.text, expected.token_ids)


@pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
def test_the_drafts_cache_shares_what_texts_begin_with(folders, monkeypatch):
    llm = LLM(*folders, policy="fixed")
    prompts = ["the cat sat on the mat. " * 9 + end for end in ("so", "then", "so")]
    expected = [llm.generate(prompt, PARAMS, num_draft_tokens=0).token_ids for prompt in prompts]
    cache = translating(llm).model.cache
    starts: list[int] = []
    extend = cache.extend
    monkeypatch.setattr(cache, "extend", lambda slot, start, end: (starts.append(start), extend(slot, start, end)))
    for prompt, tokens in zip(prompts, expected, strict=True):
        starts.clear()
        assert llm.generate(prompt, PARAMS).token_ids == tokens
        assert (starts[0] > 0) == (prompt is not prompts[0]) and starts[0] % PAGE == 0
    assert cache.kept_bytes and not cache.used


def test_a_text_that_is_given_up_leaves_its_slot_in_order(folders):
    llm = LLM(*folders, max_batch_size=1, policy="fixed")
    plain = [r.token_ids for r in llm.generate(PROMPTS, PARAMS, num_draft_tokens=0)]
    for prompt, expected in zip(PROMPTS, plain, strict=True):
        stream = llm.stream(prompt, PARAMS)
        next(stream)
        stream.close()
        assert llm.generate(prompt, PARAMS).token_ids == expected
    assert not translating(llm).readings


def test_structured_output_keeps_its_form(folders):
    pytest.importorskip("llguidance")
    llm = LLM(*folders, policy="fixed")
    form = Structured.regex("(the cat|a café) [a-z]{12,20}")
    params = [SamplingParams(structured=form, temperature=t, seed=1) for t in (0, 0.9)]
    for own in params:
        found = llm.generate("once", own)
        assert found.token_ids == llm.generate("once", own, num_draft_tokens=0).token_ids
        assert found.stats.drafted and found.text.startswith(("the cat ", "a café "))


@pytest.mark.parametrize("temperature", (0.0, 0.8))
def test_the_real_pair(shared, temperature):
    llm = LLM(shared / "models" / "stories3M", shared / "models" / "stories260K", policy="fixed")
    asked = [SamplingParams(temperature=temperature, seed=i, max_new_tokens=96) for i in range(4)]
    prompts = ["Once upon a time", "Lily and Tom — naïve 😀", "One day, a dog", "“Hello,” said"]
    drafted = llm.generate(prompts, asked, num_draft_tokens=3)
    plain = llm.generate(prompts, asked, num_draft_tokens=0)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    accepted = sum(r.stats.accepted for r in drafted) / sum(r.stats.drafted for r in drafted)
    assert accepted > 0.15
    assert translating(llm).overlap == Overlap(421, 421, 4005)


def test_the_real_pair_the_other_way_and_in_a_list(shared):
    """Every token of the target is known to the draft, whose own are longer; the policy chooses among drafters."""
    llm = LLM(shared / "models" / "stories260K", ["suffix", shared / "models" / "stories3M"], max_batch_size=2)
    asked = [SamplingParams(temperature=warmth, seed=i, max_new_tokens=64) for i, warmth in enumerate((0, 0.8))]
    prompts = ["Once upon a time", "Lily and Tom — naïve 😀"]
    plain = [r.token_ids for r in llm.generate(prompts, asked, num_draft_tokens=0)]
    for own in ({}, {"draft": "model", "num_draft_tokens": 4}):
        assert [r.token_ids for r in llm.generate(prompts, asked, **own)] == plain


@pytest.mark.parametrize("policy", ("gain", "fixed"))
def test_it_can_be_one_of_several(shuffled, policy):
    llm = LLM(shuffled[0], ["suffix", shuffled[1]], policy=policy, max_batch_size=2, draft_weight_format="none")
    assert isinstance(llm.drafter, Several) and list(llm.drafter.drafters) == ["suffix", "model"]
    asked = [replace(PARAMS, temperature=temperature, seed=i) for i, temperature in enumerate((0, 0.8, 1.0, 0.8))]
    prompts = [[7, 200, 65 + i] for i in range(len(asked))]
    plain = [r.token_ids for r in llm.generate(prompts, asked, num_draft_tokens=0)]
    chosen = llm.generate(prompts, asked)
    alone = llm.generate(prompts, asked, draft="model", num_draft_tokens=3)
    assert [r.token_ids for r in chosen] == [r.token_ids for r in alone] == plain
    assert sum(r.stats.by_source["model"].accepted for r in chosen if "model" in r.stats.by_source) > 0
    assert all(r.stats.by_source["model"].accepted == r.stats.by_source["model"].drafted for r in alone)


def drafts_byte_by_byte(llm: LLM, data: bytes, begin: int) -> list[tuple[int, ...]]:
    """Of a text that grows; then, while that goes on, of others that are as long as it once was."""
    tokens = [translating(llm).by.target.ids[bytes([byte])] for byte in data]
    lengths, drafts = range(begin, len(tokens) + 1), []
    grows = asking(tokens[:begin], slot=0)
    for end in lengths:
        grows.token_ids[:] = tokens[:end]
        drafts += [llm.drafter.propose([grows], Fixed(4))[0].tokens for _ in range(2)]
    for end in lengths:
        new = asking(tokens[:end], slot=1)
        drafts.append(llm.drafter.propose([new], Fixed(4))[0].tokens)
        llm.drafter.forget(new)
    llm.drafter.forget(grows)
    return drafts


def asking(tokens: list[int], slot: int) -> Request:
    request = Request(tokens, SamplingParams(temperature=0.8), 1, lambda token: False, slot=slot)
    request.draft_limit = 4
    return request


@pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
def test_shared_pages_change_no_draft(folders, monkeypatch):
    """A token's end may come after others took its page: it is spelled anew in a copy, and theirs stays what it was."""
    copied, own = [], PageCache._own
    monkeypatch.setattr(PageCache, "_own", lambda cache, slot: (copied.append(slot), own(cache, slot)))
    together, alone = (LLM(*folders, max_batch_size=2) for _ in range(2))
    together.drafter.model.cache.sharing, alone.drafter.model.cache.sharing = True, False
    data = " ".join(made.TEXT[:4]).encode()
    for at in (1, 27, 39):  # where "the" or the like is begun by the last token of a page
        drafts = [drafts_byte_by_byte(llm, data[at : at + 160], 120) for llm in (together, alone)]
        assert drafts[0] == drafts[1]
    assert copied


# --- what is shared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", (0.0, 0.7, 1.0))
def test_the_same_tokens_in_another_order_lose_nothing(shuffled, temperature):
    """Greedy and coupled: with noise keyed by the target's ids a model agrees with itself, also inside characters."""
    llm = LLM(*shuffled, policy="fixed", draft_weight_format="none")
    assert translating(llm).overlap == Overlap(256, 256, 256)
    result = llm.generate([7, 200, 65], replace(PARAMS, temperature=temperature, seed=3))
    assert result.stats.drafted > 20
    assert result.stats.draft_acceptance_rate == 1


class Uncoupled(TranslatingDrafter):
    """Draws as if its requests had other seeds."""

    def propose(self, requests, policy):
        seeds = [request.seed for request in requests]
        for request, seed in zip(requests, seeds, strict=True):
            request.seed = seed + 1000
        drafts = super().propose(requests, policy)
        for request, seed in zip(requests, seeds, strict=True):
            request.seed = seed
        return drafts


def test_the_targets_noise_raises_acceptance(shuffled, tmp_path):
    """A draft that is not quite the target, with its tokens in another order: coupling is what agrees."""
    draft = save(tmp_path / "off", made.of_size(256, ORDER), 256, 0, torch.tensor(ORDER), off=0.005)
    llm = LLM(shuffled[0], draft, policy="fixed")
    drafter = translating(llm)
    asked = [replace(PARAMS, temperature=1.0, seed=i) for i in range(6)]
    rates, texts = [], []
    for own in (drafter, Uncoupled(drafter.model, drafter.by)):
        with llm.engine.using(own, None):
            results = llm.generate([[7, 200, 65]] * len(asked), asked, num_draft_tokens=3)
        rates.append(sum(r.stats.accepted for r in results) / sum(r.stats.drafted for r in results))
        texts.append([r.token_ids for r in results])
    assert texts[0] == texts[1]
    assert rates[0] > 3 * rates[1], rates


def test_planted_bug_noise_by_the_drafts_ids_is_found(shuffled, monkeypatch):
    llm = LLM(*shuffled, policy="fixed")
    drafter = translating(llm)
    own = drafter.by.columns.clone()
    drafter.columns = drafter.by.columns = torch.arange(256)  # each token under the draft's own id
    result = llm.generate([7, 200, 65], replace(PARAMS, temperature=1.0, seed=3))
    drafter.columns = drafter.by.columns = own
    assert result.stats.draft_acceptance_rate < 0.9


def draft_for(llm: LLM, params: SamplingParams, seed: int):
    request = Request([7, 200, 65], params, seed, lambda token: False, slot=0)
    request.draft_limit = 6
    (draft,) = llm.drafter.propose([request], Fixed(6))
    llm.drafter.forget(request)
    return draft


def test_rejection_gets_the_likeliest_tokens_as_one_hot(shuffled):
    """A q over the target's tokens is not known; what is drafted does not depend on the seed, so q = 1 is right."""
    llm = LLM(*shuffled)
    drafts = [draft_for(llm, SamplingParams(temperature=1.0, verifier="rejection"), seed) for seed in range(8)]
    assert len({draft.tokens for draft in drafts}) == 1
    assert all(draft.probs is None and len(draft) == 6 for draft in drafts)
    coupled = [draft_for(llm, SamplingParams(temperature=1.0), seed) for seed in range(8)]
    assert len({draft.tokens for draft in coupled}) > 1


def test_where_little_is_shared_the_likeliest_token_is_drafted(folders):
    llm = LLM(*folders)
    little = translating(llm)
    little.argmax = ("rejection", "coupled")
    drafts = [draft_for(llm, SamplingParams(temperature=1.0), seed) for seed in range(8)]
    assert len({draft.tokens for draft in drafts}) == 1


def test_padding_is_no_other_vocabulary(tmp_path):
    tokenizer = made.byte_level()
    target = save(tmp_path / "target", tokenizer, len(tokenizer) + 7, 0)
    draft = save(tmp_path / "draft", tokenizer, len(tokenizer), 0)
    llm = LLM(target, draft)
    assert type(llm.drafter) is ModelDrafter


def test_special_tokens_are_shared_by_name_and_by_role():
    ours, theirs = made.byte_level(), made.byte_fallback()
    by = Translation(ours, len(ours), theirs, len(theirs))
    assert by.specials == {ours.eos_token_id: theirs.eos_token_id}
    assert by.start == [theirs.bos_token_id]
    assert int(by.columns[ours.eos_token_id]) == theirs.eos_token_id
    assert theirs.unk_token_id not in by.columns.tolist()


def test_it_is_said_once(folders, caplog):
    with caplog.at_level(logging.WARNING, "foredraft"):
        llm = LLM(*folders)
        llm.generate("the cat", PARAMS)
    said = [record.message for record in caplog.records if "another vocabulary" in record.message]
    assert len(said) == 1 and "tokens in common" in said[0]
    assert serving.describe(llm, "a", "b", 0.0).vocabulary in said[0]


def test_doctor_names_the_one_among_several(folders):
    several = LLM(folders[0], ["suffix", folders[1]])
    overlap = several.drafter.drafters["model"].overlap
    assert serving.describe(several, "a", "b", 0.0).vocabulary == f"model: {overlap}"
    assert serving.describe(LLM(folders[0], "suffix"), "a", "b", 0.0).vocabulary is None


# --- the border -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", (made.byte_level(), made.byte_fallback()), ids=("bytes", "pieces"))
def test_bytes_are_spelled_and_read_back(tokenizer):
    speller, source = Speller(tokenizer, len(tokenizer)), random.Random(0)
    whole = "".join(made.TEXT).encode()
    for _ in range(300):
        start, length = source.randrange(len(whole)), source.randrange(1, 40)
        data = whole[start : start + length] + source.randbytes(source.randrange(3))  # cut anywhere, and broken
        assert speller.text(speller.spell(data)) == data


def test_a_piece_within_a_text_gets_no_space_before_it():
    tokenizer = made.byte_fallback()
    speller = Speller(tokenizer, len(tokenizer))
    assert speller.text(speller.spell(b"at</s>")) == b"at</s>"  # and its words are no control tokens


@pytest.mark.parametrize("swapped", (False, True))
def test_a_text_read_bit_by_bit_is_the_text(swapped):
    """Whatever was drafted and refused in between, the cache is good up to where `uncached` says."""
    pair = [made.byte_level(), made.byte_fallback()]
    ours, theirs = reversed(pair) if swapped else pair
    by, source = Translation(ours, len(ours), theirs, len(theirs)), random.Random(1)
    for text in (*PROMPTS, *made.TEXT[:4]):
        tokens = ours(text)["input_ids"]
        reading, held, at = Reading(by.start), [], 0
        while at < len(tokens):
            at += source.randint(1, 4)
            reading.follow(tokens[:at], by)
            start = reading.uncached(reading.ids)
            assert held[:start] == reading.ids[:start] and start < len(reading.ids)
            guessed = [source.randrange(3, len(theirs)) for _ in range(source.randrange(4))]
            reading.cached += guessed
            held = list(reading.cached)
        expected = theirs(text)["input_ids"]
        assert theirs.decode(reading.ids, skip_special_tokens=True) == ours.decode(tokens, skip_special_tokens=True)
        assert reading.ids[: len(by.start)] == expected[: len(by.start)]


# --- tuning ---------------------------------------------------------------------------------------------------------


def test_tuning_says_what_is_shared_and_that_it_cannot_pay(folders):
    llm = LLM(folders[0], "none")
    others = ("ngram", "suffix", "int4", "int8", "skip", "int4+skip")
    options = TuneOptions(drafts=(str(folders[1]),), without=others, prompts=1, tokens=12, trials=0, rounds=1)
    advice = pipeline.advise(llm, options)
    (row,) = advice.rows
    found = row.translated
    assert found is not None and found.overlap.shared > 250
    assert advice.as_dict()["rows"][0]["vocabulary"]["shared"] == found.overlap.shared

    def said(at_best: float, speedup: float) -> str:
        predicted = replace(row.forecast, speedup=speedup)
        own = replace(row, measured=None, forecast=predicted, translated=replace(found, at_best=at_best))
        return "\n".join(lines(replace(advice, rows=(own,))))

    assert f"has another vocabulary: {found.overlap}" in said(1.0, 0.5)
    assert "so little shared cannot pay: at alpha" in said(1.0, 0.5)
    assert "cannot pay here: with translation a draft token costs" in said(1.5, 0.5)
    assert "cannot pay" not in said(1.5, 1.2)
    assert found.at_best < 1.1  # two random models


# --- bad input ------------------------------------------------------------------------------------------------------


def test_a_draft_folder_without_a_tokenizer(folders, tmp_path):
    with pytest.raises(ModelError, match=r"has no tokenizer that loads .*; add its tokenizer files"):
        LLM(folders[0], save(tmp_path / "bare", None, 100, 0))


def test_bad_drafts_in_a_list_are_refused_alike(folders, tmp_path):
    with pytest.raises(ModelError, match=r"has no tokenizer that loads .*; add its tokenizer files"):
        LLM(folders[0], ["suffix", save(tmp_path / "bare", None, 100, 0)])


def test_a_target_without_a_tokenizer(folders, tmp_path):
    bare = save(tmp_path / "bare", None, 100, 0)
    with pytest.raises(VocabularyMismatchError, match=r"the target came without a tokenizer .*pass tokenizer=\.\.\."):
        LLM(bare, folders[1])


def test_a_tokenizer_that_does_not_write_bytes(folders, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    draft = save(tmp_path / "words", words, 2, 0)
    with pytest.raises(VocabularyMismatchError, match=r"token 0 is 'a' in the draft .*translated: the draft's .*bytes"):
        LLM(folders[0], draft)
