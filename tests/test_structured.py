"""Structured output: every text has its form, and is that of plain decoding under the same mask, whoever drafts."""

import json
import re
from pathlib import Path

import pydantic
import pytest
import torch
from fakes import Oracle, RandomDrafter, Wrong
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, PreTrainedTokenizerFast

from foredraft import LLM, SamplingParams, Structured
from foredraft.errors import GrammarError, RequestError
from foredraft.llm import BUNDLED
from foredraft.structured import compile, matcher, source
from foredraft.structured.compile import Grammars
from foredraft.structured.constraint import members
from foredraft.structured.spec import MAX_DEPTH, MAX_SOURCE

llguidance = pytest.importorskip("llguidance")
pytest.importorskip("llguidance.hf")
jsonschema = pytest.importorskip("jsonschema")
SCHEMAS = json.loads((Path(__file__).parent / "data" / "schemas.json").read_text())
PROMPT = "User: I need a table for two in Oakland tonight.\nAssistant: "
PERSON = SCHEMAS["person"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(max_batch_size=8)


@pytest.fixture(scope="module")
def grammars(llm: LLM) -> Grammars:
    assert llm.grammars is not None
    return llm.grammars


def params(schema, seed: int = 0, **options) -> SamplingParams:
    return SamplingParams(structured=schema, seed=seed, **{"max_new_tokens": 200} | options)


SETTINGS = ({}, {"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.95})


# --- the texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS)
def test_fifty_schemas_in_batches_of_eight_are_those_of_plain_decoding(llm, options):
    """Requests of other schemas beside it, the drafter's guesses, forced tokens: nothing changes a text."""
    assert len(SCHEMAS) == 50
    asked = [params(schema, seed, **options) for seed, schema in enumerate(SCHEMAS.values())]
    drafted = llm.generate([PROMPT] * 50, asked)
    plain = llm.generate([PROMPT] * 50, asked, num_draft_tokens=0)
    for name, guessed, result in zip(SCHEMAS, drafted, plain, strict=True):
        assert guessed.token_ids == result.token_ids, name
        assert result.finish_reason == guessed.finish_reason == "stop", (name, result.text)
        jsonschema.validate(json.loads(guessed.text), SCHEMAS[name])
    assert sum(result.stats.accepted for result in drafted) > sum(len(result.token_ids) for result in drafted) / 3


@pytest.mark.parametrize("draft", ["ngram", "int4", "skip", "oracle", "wrong", "random"])
@pytest.mark.parametrize("options", SETTINGS[:2])
def test_every_drafter_under_a_grammar(llm, draft, options):
    names = ("booking", "array of objects", "unicode keys", "ticket")
    asked = [params(SCHEMAS[name], seed, **options) for seed, name in enumerate(names)]
    plain = llm.generate([PROMPT] * 4, asked, num_draft_tokens=0)
    texts = {result.seed: [*result.prompt_token_ids, *result.token_ids] for result in plain}
    fakes = {"oracle": Oracle(texts), "wrong": Wrong(texts, 4096), "random": RandomDrafter(4096)}
    other = LLM(BUNDLED / "target", fakes.get(draft, draft), max_batch_size=4)
    for gamma in (None, 1, 5):
        drafted = other.generate([PROMPT] * 4, asked, num_draft_tokens=gamma)
        assert [result.token_ids for result in drafted] == [result.token_ids for result in plain]


class Alone(LogitsProcessor):
    """llguidance by itself: one matcher, one token at a time, as its users wire it into transformers."""

    def __init__(self, tokens, schema, prompt_len: int) -> None:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=source.JSON_FORM)
        self.matcher, self.seen = llguidance.LLMatcher(tokens, grammar, log_level=0), prompt_len

    def __call__(self, input_ids, scores):
        for token in input_ids[0, self.seen :].tolist():
            assert self.matcher.consume_token(token)
        self.seen = input_ids.shape[1]
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8) & 1).bool().flatten()[: scores.shape[1]]
        return scores.masked_fill(~allowed, -torch.inf)


def test_texts_are_those_of_the_library_alone_in_transformers():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "target")
    model = AutoModelForCausalLM.from_pretrained(BUNDLED / "target", dtype=torch.float32).eval()
    tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=4096)
    ours = LLM(dtype="float32", max_batch_size=8)
    found = ours.generate([PROMPT] * 50, [params(schema) for schema in SCHEMAS.values()])
    ids = tokenizer(PROMPT, return_tensors="pt")
    length = ids["input_ids"].shape[1]
    for (name, schema), result in zip(SCHEMAS.items(), found, strict=True):
        alone = Alone(tokens, schema, length)
        wanted = model.generate(**ids, do_sample=False, max_new_tokens=200, logits_processor=[alone], pad_token_id=0)
        assert result.token_ids == wanted[0, length:].tolist(), name


def test_rejection_keeps_the_form(llm):
    for seed, name in enumerate(("booking", "invoice", "unicode enum")):
        result = llm.generate(PROMPT, params(SCHEMAS[name], seed, temperature=1.0, verifier="rejection"))
        jsonschema.validate(json.loads(result.text), SCHEMAS[name])


def test_regex_choice_and_grammar(llm):
    forms = {
        "regex": (Structured.regex("[A-Z][a-z]{2,6} [0-9]{2}"), r"[A-Z][a-z]{2,6} [0-9]{2}"),
        "choice": (Structured.choice(["Oakland", 'say "hi"', "東京\n"]), 'Oakland|say "hi"|東京\n'),
        "grammar": (Structured.grammar('start: sum\nsum: N ("+" N)~1..3\nN: /[1-9]/'), r"[1-9](\+[1-9]){1,3}"),
    }
    for form, pattern in forms.values():
        for options in SETTINGS:
            result = llm.generate(PROMPT, params(form, **options))
            assert re.fullmatch(pattern, result.text), result.text
            assert result.finish_reason == "stop"
            assert result.token_ids == llm.generate(PROMPT, params(form, **options), num_draft_tokens=0).token_ids


def test_of_a_pydantic_model_nothing_is_closed_that_something_beside_adds_to():
    class Place(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(json_schema_extra={"anyOf": [{"properties": {"zip": {}}}]})
        city: str

    class Either(Place):
        model_config = pydantic.ConfigDict(json_schema_extra={"anyOf": [{"required": ["city"]}]})

    assert "additionalProperties" not in Structured.json_schema(Place).source
    assert json.loads(Structured.json_schema(Either).source)["additionalProperties"] is False


def test_pydantic_models_are_schemas(llm):
    class Booking(pydantic.BaseModel):
        city: str = pydantic.Field(max_length=12)
        people: int = pydantic.Field(ge=1, le=9)

    closed = Booking.model_json_schema() | {"additionalProperties": False}
    for given in (Booking, closed, Structured.json_schema(json.dumps(closed))):
        booking = Booking.model_validate_json(llm.generate(PROMPT, params(given)).text)
        assert booking.city and 1 <= booking.people <= 9


def test_beside_stops_penalties_bias_logprobs_and_streams(llm):
    asked = params(
        SCHEMAS["booking"], temperature=0.9, repetition_penalty=1.2, logit_bias={5: 1.5}, logprobs=2, stop=("city",)
    )
    plain = llm.generate(PROMPT, asked, num_draft_tokens=0)
    *_, last = llm.stream(PROMPT, asked)
    assert last.result is not None
    assert last.result.token_ids == plain.token_ids
    assert (plain.finish_reason, plain.text[-1]) == ("stop", '"')
    assert [found.token for found in last.result.logprobs] == plain.token_ids
    assert [found.logprob for found in last.result.logprobs] == [found.logprob for found in plain.logprobs]
    short = llm.generate(PROMPT, params(PERSON, max_new_tokens=5))
    assert (short.finish_reason, len(short.token_ids)) == ("length", 5)


def test_chat_ends_with_the_end_of_its_turn(llm):
    result = llm.chat([{"role": "user", "content": "A table?"}], params(PERSON))
    jsonschema.validate(json.loads(result.text), PERSON)
    assert result.finish_reason == "stop"


# --- forced tokens --------------------------------------------------------------------------------------------------


def test_what_has_no_choice_is_drafted_and_then_the_drafter_goes_on():
    llm = LLM(max_batch_size=1)
    seen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    accepted = llm.engine._accepted

    def watch(draft, request):
        seen.append((draft.source, request.lead, draft.tokens))
        return accepted(draft, request)

    llm.engine._accepted = watch
    result = llm.generate(PROMPT, params(SCHEMAS["long literals"]), num_draft_tokens=16)
    led = [(source, lead, tokens) for source, lead, tokens in seen if lead]
    assert {source for source, _, _ in led} == {"forced", "forced+model"}
    assert all(tokens[: len(lead)] == lead for _, lead, tokens in led)
    assert result.stats.mean_acceptance_length > 5


def test_without_a_drafter_nothing_is_forced():
    result = LLM(BUNDLED / "target", "none").generate(PROMPT, params(PERSON))
    assert result.stats.drafted == 0


# --- the state is rolled back ---------------------------------------------------------------------------------------


def forget_to_roll_back(self, count):
    del self.ahead[len(self.ahead) - count :]


def roll_back_one_less(self, count):
    if count:
        self.matcher.rollback(count - 1) if count > 1 else None
        del self.ahead[-count:]


@pytest.mark.parametrize("planted", [forget_to_roll_back, roll_back_one_less])
def test_planted_bug_a_grammar_that_is_not_rolled_back_is_found(llm, planted, monkeypatch):
    asked = params(SCHEMAS["booking"], 3, temperature=1.0)
    plain = llm.generate(PROMPT, asked, num_draft_tokens=0)
    monkeypatch.setattr(matcher.GrammarConstraint, "_roll_back", planted)
    try:
        same = llm.generate(PROMPT, asked, num_draft_tokens=5).token_ids == plain.token_ids
    except RequestError:  # the matcher refuses a token
        same = False
    assert not same


def test_looking_ahead_leaves_no_trace(llm, grammars):
    form, ends = Structured.of(SCHEMAS["array of objects"]), (0,)
    text = llm.generate(PROMPT, params(SCHEMAS["array of objects"])).token_ids
    looked, calm = grammars.constraint(form, ends), grammars.constraint(form, ends)
    source = RandomDrafter(4096, seed=1).random
    for i, token in enumerate(text):
        guesses = [source.randrange(4096) for _ in range(2)]
        path = [*text[i : i + source.randrange(6)], *guesses]
        looked.allowed_after([path[:n] for n in range(len(path) + 1)])
        looked.allowed(path)
        assert looked.forced(9) == calm.forced(9)
        assert looked.allowed_after([()]) == calm.allowed_after([()])
        assert matcher.contains(looked.allowed_after([()])[0], token)
        looked.commit([token])
        calm.commit([token])
    assert looked.forced(4) == ()


@pytest.mark.parametrize("ends", [(0,), (7,), (7, 0, 9)])
def test_a_text_ends_where_its_form_is_complete_in_any_of_its_ends(llm, ends):
    """And a model without the tokenizer's last tokens is never offered them."""
    constraint = Grammars(llm.tokenizer, 301).constraint(Structured.regex("[ab]{2,3}"), ends)
    a, b = llm.tokenizer.convert_tokens_to_ids(["a", "b"])
    for path, complete in (((), False), ((a,), False), ((a, b), True), ((a, b, a), True)):
        (bits,) = constraint.allowed_after([path])
        allowed = set(members(bits))
        assert len(bits) == 38 and max(allowed) < 301
        assert allowed & {0, 7, 9} == (set(ends) if complete else set())
        assert {a, b} <= allowed or len(path) == 3


def test_rows_behind_a_token_that_may_not_come_are_left_alone(grammars):
    constraint = grammars.constraint(Structured.regex("ab"), (0,))
    everything = b"\xff" * 512
    assert constraint.allowed_after([()]) != [everything]
    assert constraint.allowed_after([(4000,), (0,), (4000, 1)]) == [everything] * 3


# --- compiling ------------------------------------------------------------------------------------------------------


def test_compiled_grammars_are_kept_by_content_and_bounded(llm, monkeypatch):
    made = []
    original = compile.compile_form
    monkeypatch.setattr(compile, "compile_form", lambda *args: made.append(args[0]) or original(*args))
    grammars = Grammars(llm.tokenizer, 4096, kept=2)
    for pattern in ("a", "b", "a", "c", "a", "b"):
        grammars.constraint(Structured.regex(pattern), (0,))
    assert [form.source for form in made] == ["a", "b", "c", "b"]
    assert len(grammars.compiled) == 2


# --- bad input ------------------------------------------------------------------------------------------------------


def deep(levels: int) -> dict:
    schema: dict = {"type": "boolean"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: '{"type": ', "no JSON: .* line 1, column 10"),
        (lambda: Structured.json_schema('{"type": "object",}'), "no JSON"),
        (lambda: Structured.json_schema("[1]"), "is no object"),
        (lambda: Structured.json_schema("true"), "is no object"),
        (lambda: {"enum": [{1, 2}]}, "cannot be written as JSON"),
        (lambda: {"minimum": float("nan")}, "cannot be written as JSON"),
        (lambda: Structured.choice([]), "at least one string"),
        (lambda: Structured.choice(["a", "b\ud800"]), r"choice has a lone surrogate, '.ud800' at character 1"),
        (lambda: Structured.choice("yes"), "at least one string"),
        (lambda: Structured.choice(["a", ""]), "something in them"),
        (lambda: Structured.choice(["a", 3]), "something in them"),
        (lambda: Structured.choice(map(str, range(20_000))), "at least one string"),
        (lambda: Structured.choice([str(i) for i in range(20_000)]), "20,000 strings; at most 10,000"),
        (lambda: Structured.regex(""), "is empty"),
        (lambda: Structured.regex(3), "is no text"),
        (lambda: Structured.grammar("  "), "is empty"),
        (lambda: Structured.regex("\ud800"), "no Unicode text"),
        (lambda: Structured.grammar('start: x "z"\nx[max_tokens=3]: /[a-z]+/'), "uses max_tokens="),
        (lambda: Structured.grammar("?start[max_tokens=3]: /[a-z]+/"), "uses max_tokens="),
        (lambda: Structured.grammar('start: x "z"\nx[lazy, stop="q"]: /[a-z]+/'), "uses stop="),
        (lambda: {"description": "x" * 10_000_000}, "10,000,.* bytes; at most 1,000,000"),
        (lambda: Structured.json_schema(" " * 10_000_000), "10,000,000 characters"),
        (lambda: Structured.json_schema("[" * 500_000), "nested"),
        (lambda: deep(MAX_DEPTH + 1), "nested .* deep"),
        (lambda: Structured.regex("(" * 300 + "a" + ")" * 300), "nested 300 deep"),
        (lambda: 3, "structured=3 is not usable"),
    ],
)
def test_what_is_refused_when_it_is_asked_for(make, message):
    with pytest.raises(GrammarError, match=message):
        value = make()
        SamplingParams(structured=Structured.json_schema(value) if isinstance(value, str) else value)


@pytest.mark.parametrize(
    "form, message",
    [
        ({"type": "strng"}, "at #: .*strng"),
        ({"type": "object", "properties": {"a": {"items": {"type": "strng"}}}}, "at #/properties/a/items: .*strng"),
        ({"properties": {"a": {"not": {"type": "null"}}}}, 'at #/properties/a: .*"not"'),
        ({"anyOf": [{"type": "null"}, {"uniqueItems": True, "type": "array"}]}, 'at #/anyOf/1: .*"uniqueItems"'),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"enum": []}, "empty"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": "string", "pattern": "a("}, "unclosed"),
        ({"type": "string", "format": "nonsense"}, "nonsense"),
        (Structured.regex("a("), "unclosed"),
        (Structured.regex("(?=a)b"), "look-around"),
        (Structured.regex(r"[^\s\S]"), "matches nothing"),
        (Structured.regex("(ab[^\\s\\S])|[^\\s\\S]c"), "matches nothing"),
        (Structured.regex("((((a{1,1000}){1,1000}){1,1000}){1,1000})"), "cannot be followed beyond"),
        ({"type": "integer", "minimum": 10**20}, "at #/minimum: 1000.* is too large"),
        ({"const": 2**53 + 1}, "at #: 9007199254740993 is too large"),
        ({"properties": {"a": {"enum": ["b", {"c": [-(2**64)]}]}}}, "at #/properties/a: -1844.* is too large"),
        ({"const": 123456789.12345679}, "at #: 123456789.12345679 has too many digits"),
        (
            {"$ref": "#/stuff/x", "stuff": {"x": {"type": "integer", "minimum": 2**60}}},
            "at #/stuff/x/minimum: 115.* is too",
        ),
        (Structured.grammar("start: nowhere"), "nowhere"),
        (Structured.grammar('begin: "a"'), "start"),
        (Structured.grammar("start: ("), "cannot be compiled"),
    ],
)
def test_what_does_not_compile_is_refused_before_anything_runs(llm, form, message):
    before = llm.engine.stats.output_tokens
    with pytest.raises(GrammarError, match=message) as caught:
        llm.generate([PROMPT, PROMPT], [SamplingParams(), params(form)])
    assert "<state>" not in str(caught.value)
    assert llm.engine.stats.output_tokens == before and not llm.engine.has_work


@pytest.mark.parametrize("option", ["\x7fa", "\x01", 'a"b\\c', "a\x85b", "\u2028", "東\n"])
def test_a_choice_of_odd_characters(llm, option):
    assert llm.generate(PROMPT, params(Structured.choice([option]))).text == option


def test_a_choice_of_thousands(llm):
    options = [f"option {i}" for i in range(5000)]
    result = llm.generate(PROMPT, params(Structured.choice(options)))
    assert result.text in options


def test_a_pattern_that_explodes_is_refused_or_followed(llm):
    for pattern in ("(a|aa){1,1000}{1,1000}", "(.*a.*b){60}", "[ab]*a[ab]{5000}", "(x+x+)+y"):
        try:
            result = llm.generate(PROMPT, params(Structured.regex(pattern), max_new_tokens=12))
        except GrammarError:
            continue
        assert len(result.token_ids) <= 12


def words(*texts: str) -> PreTrainedTokenizerFast:
    """A tokenizer of these words alone: no bytes to fall back on."""
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(("<end>", *texts))}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def test_a_vocabulary_that_cannot_spell_the_grammar_is_refused():
    grammars = Grammars(words("a", "b", "c"), 4)
    assert grammars.constraint(Structured.regex("a+b"), (0,)).allowed_after([()]) == [bytes([0b0010])]
    for form in (Structured.regex("x"), Structured.choice(["abx", "a"]), Structured.regex("a東")):
        with pytest.raises(GrammarError, match="spell"):
            grammars.constraint(form, (0,))
    with pytest.raises(GrammarError, match="JSON schema wants 'größe'"):
        Grammars(words(*'abceginorz{}[]",: '), 19).constraint(
            Structured.json_schema({"properties": {"größe": {}}}), (0,)
        )
    constraint = grammars.constraint(Structured.regex("a(x|y)|b"), (0,))  # a way on that turns out to have none
    with pytest.raises(GrammarError, match="no token of this vocabulary"):
        constraint.allowed_after([(1,)])


def test_contradictions_and_what_is_missing(llm, monkeypatch):
    with pytest.raises(RequestError, match="ignore_eos contradicts structured"):
        params(PERSON, ignore_eos=True)
    with pytest.raises(RequestError, match="names none; give one in stop_token_ids"):
        llm.grammars.constraint(Structured.regex("a"), ())
    monkeypatch.setattr(llm.jobs, "grammars", None)
    with pytest.raises(RequestError, match="needs a tokenizer"):
        llm.generate([5, 6], params(PERSON))


def test_without_llguidance_the_extra_is_named(llm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'foredraft\[structured\]'"):
        Grammars(llm.tokenizer, 4096).constraint(Structured.regex("a"), (0,))


def test_a_model_that_cannot_be_read_is_refused(llm):
    class Slow:
        eos_token_id, all_special_ids = 0, (0,)

        def __len__(self):
            return 5

    with pytest.raises(RequestError, match="cannot read this tokenizer"):
        Grammars(Slow(), 5).constraint(Structured.regex("a"), (0,))


def test_sizes_are_as_documented():
    assert MAX_SOURCE == 1_000_000


# --- command line ---------------------------------------------------------------------------------------------------


def test_flags_name_a_form(tmp_path):
    from foredraft.cli.options import RunOptions
    from foredraft.cli.session import sampling_params

    schema, grammar, missing = tmp_path / "s.json", tmp_path / "g.lark", tmp_path / "none"
    schema.write_text('\ufeff{"type": "null"}', encoding="utf-8")
    grammar.write_text('start: "a"', encoding="utf-8")
    forms = (
        (RunOptions(json_schema=schema), Structured.json_schema({"type": "null"})),
        (RunOptions(grammar=grammar), Structured.grammar('start: "a"')),
        (RunOptions(regex="a+"), Structured.regex("a+")),
        (RunOptions(), None),
    )
    for options, form in forms:
        assert sampling_params(options).structured == form
    with pytest.raises(RequestError, match="--json-schema and --regex contradict"):
        sampling_params(RunOptions(json_schema=schema, regex="a"))
    with pytest.raises(RequestError, match="cannot be read as text"):
        sampling_params(RunOptions(grammar=missing))
