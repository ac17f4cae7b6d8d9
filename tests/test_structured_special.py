"""Forms that contain the text of special tokens: spelled in ordinary tokens, whole, and never ended by it."""

import json
import re

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers_of_bytes import byte_fallback, byte_level
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foredraft import LLM, SamplingParams, Structured
from foredraft.errors import GrammarError
from foredraft.llm import BUNDLED
from foredraft.structured.compile import Grammars
from foredraft.structured.constraint import members

pytest.importorskip("llguidance")
PROMPT = "User: I need a table for two in Oakland tonight.\nAssistant: "
END = "<|endoftext|>"
MEMBER = {"type": "object", "properties": {END: {"const": 1}}, "required": [END], "additionalProperties": False}
FORMS = [
    (Structured.regex(r"a<\|endoftext\|>b"), f"a{END}b"),
    (Structured.regex(r"<\|endoftext\|>"), END),
    (Structured.choice([f"x {END} y"]), f"x {END} y"),
    (Structured.json_schema({"const": f"x {END} y"}), f'"x {END} y"'),
    (Structured.json_schema(MEMBER), json.dumps({END: 1})),
    (Structured.grammar(f'start: "a" "{END}" "b"'), f"a{END}b"),
    (Structured.grammar(f"start: /[ab]/ /<.endoftext.>[cd]/ // not <{END}>"), None),
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(max_batch_size=4)


@pytest.mark.parametrize("form, text", FORMS)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.1, "seed": 3}])
def test_text_of_a_token_that_ends_texts_does_not_end_one(llm, form, text, options):
    params = SamplingParams(structured=form, max_new_tokens=60, **options)
    drafted, plain = llm.generate(PROMPT, params), llm.generate(PROMPT, params, num_draft_tokens=0)
    assert drafted.token_ids == plain.token_ids and drafted.finish_reason == "stop"
    found = llm.tokenizer.decode(drafted.token_ids[:-1], skip_special_tokens=True)
    if form.kind == "grammar" and text is None:
        assert re.fullmatch(r"[ab]<.endoftext.>[cd]", found)
    else:
        assert found == text
    assert llm.tokenizer.eos_token_id not in drafted.token_ids[:-1]


def with_added(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<call>", special=True)])
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    """Its pieces are those of the vocabulary, special ones too."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("a", -1.0), ("old", -1.0)], 0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


VOCABULARIES = {
    "byte level": lambda: with_added(byte_level()),
    "byte fallback": lambda: with_added(byte_fallback()),
    "unigram": unigram,
    "bundled": lambda: with_added(AutoTokenizer.from_pretrained(BUNDLED / "target")),
}


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize(
    "text", ["<s>old</s> new", "a</s>b", "</s>", "a<end>b", "<think>a</think>", "<call>", "</s></s>"]
)
def test_every_kind_of_vocabulary_spells_the_text_of_its_special_tokens(name, text):
    tokenizer = VOCABULARIES[name]()
    grammars = Grammars(tokenizer, len(tokenizer))
    vocabulary = grammars._vocabulary()
    end = tokenizer.eos_token_id
    constraint = grammars.constraint(Structured.choice([text]), (end,))
    found: list[int] = []
    while True:
        forced = constraint.forced(99)
        allowed = members(constraint.allowed_after([()])[0])
        token = forced[0] if forced else allowed[0]
        assert token in allowed
        constraint.commit([token])
        if token == end:
            break
        found.append(token)
    assert vocabulary.decode_bytes(found) == text.encode()
    assert not any(map(vocabulary.is_special_token, found))


def test_a_grammar_may_still_name_special_tokens_and_no_token_that_ends_the_text():
    tokenizer = with_added(byte_level())
    call, end = tokenizer.convert_tokens_to_ids(["<call>", "<end>"])
    grammars = Grammars(tokenizer, len(tokenizer))
    assert grammars.mark("<call>") == f"<[{call}]>"
    for written in ("<call>", f"<[{call}]>"):
        constraint = grammars.constraint(Structured.grammar(f'start: {written} "<call>" {written}'), (end,))
        forced = constraint.forced(99)
        assert forced[0] == call and call not in forced[1:-2] and forced[-2:] == (call, end)
    for written in ("<end>", f"<[{end}]>"):
        with pytest.raises(GrammarError, match="names the token '<end>', which ends the text; leave it out"):
            grammars.constraint(Structured.grammar(f'start: "a" {written} "b"'), (end,))
    ranged = grammars.constraint(Structured.grammar(f'start: "a" <[{end}-{end + 1}]> "b"'), (end,))
    ranged.commit(tokenizer.convert_tokens_to_ids(["a"]))
    assert members(ranged.allowed_after([()])[0]) == [end + 1]  # amid the text nothing ends it


def test_html_on_a_model_whose_special_tokens_look_like_it(shared):
    llm = LLM(shared / "models" / "stories3M", "none")
    for form, text in ((Structured.regex("a</s>b"), "a</s>b"), (Structured.regex("<s>old</s> new"), "<s>old</s> new")):
        result = llm.generate("Once", SamplingParams(structured=form, max_new_tokens=40))
        assert (result.text.strip(), result.finish_reason) == (text, "stop")


def test_what_has_no_ordinary_spelling_is_refused():
    tokenizer = Tokenizer(models.BPE({"<end>": 0, "a": 1, "b": 2}, []))
    tokenizer.decoder = decoders.ByteLevel()
    grammars = Grammars(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"), 3)
    for form in (Structured.regex("a<end>b"), Structured.choice(["a", "<end>"])):
        with pytest.raises(GrammarError, match="cannot spell"):
            grammars.constraint(form, (0,))
