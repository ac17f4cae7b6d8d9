"""What is said of a form that is refused, or that says something else than was meant."""

import json
import traceback
import warnings
from contextlib import nullcontext

import pydantic
import pytest
from transformers import AutoTokenizer

from foredraft import SamplingParams, Structured
from foredraft.errors import GrammarError, LateError, SchemaWarning
from foredraft.llm import BUNDLED
from foredraft.structured import compile
from foredraft.structured.compile import Grammars, check_form
from foredraft.structured.source import MAX_OPTIONAL, followed
from foredraft.structured.spec import MAX_LEVELS

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "target")
    return Grammars(tokenizer, len(tokenizer))


def deep(levels: int) -> dict:
    schema: dict = {"type": "boolean"}
    for _ in range(levels - 1):
        schema = {"type": "array", "items": schema}
    return schema


def optional(count: int, **more) -> dict:
    return {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(count)}} | more


def test_each_who_asks_gets_an_error_of_their_own(grammars):
    """The kept one would collect the frames, and so the prompts, of all who ask."""
    form = Structured.regex("(ab")
    found = []
    for _ in range(3):
        with pytest.raises(GrammarError, match="unclosed group") as caught:
            grammars.constraint(form, (0,))
        found.append(caught.value)
    assert len({id(error) for error in found}) == 3 and len({str(error) for error in found}) == 1
    assert len({len(traceback.extract_tb(error.__traceback__)) for error in found}) == 1


def test_a_late_form_stays_a_late_error(grammars, monkeypatch):
    class Late:
        def run(self, form, vocabulary, seconds):
            raise LateError("too long")

    monkeypatch.setattr(compile, "trials", Late)
    for _ in range(2):
        with pytest.raises(LateError, match="too long"):
            grammars.constraint(Structured.regex("late"), (0,))
    check_form(Structured.regex("late"))  # left for later


@pytest.mark.parametrize(
    "kind, source, message",
    [
        ("xml", "<a/>", "kind='xml' is not usable; one of json_schema, regex, choice, grammar"),
        ("json", "{}", "kind='json' is not usable"),
        ("json_schema", "{", "no JSON"),
        ("json_schema", "[]", "use Structured.json_schema"),
        ("choice", '"yes"', "use Structured.choice"),
        ("choice", "[]", "use Structured.choice"),
        ("regex", 3, "is no text"),
    ],
)
def test_a_form_made_by_hand_is_checked(kind, source, message):
    with pytest.raises(GrammarError, match=message):
        Structured(kind, source)


def test_a_schema_may_be_nested_so_deep(grammars):
    grammars.constraint(Structured.json_schema(deep(MAX_LEVELS)), (0,))
    with pytest.raises(GrammarError, match=f"nested {MAX_LEVELS + 1} deep; at most {MAX_LEVELS} objects and lists"):
        Structured.json_schema(deep(MAX_LEVELS + 1))
    grammars.constraint(Structured.choice(["(" * 300]), (0,))  # a text is not nested


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: {"description": "x" * 1_300_000}, "^the JSON schema has 1,300,019 bytes; at most 1,000,000"),
        (lambda: optional(2000), "has 2,000 optional properties at #; at most 1,000 can be followed: require them"),
        (lambda: {"properties": {"a": {"oneOf": [{"type": "string"}, {"maxLength": 3, "type": "string"}]}}},
         r'at #/properties/a: oneOf whose parts overlap is not supported; write anyOf, or "x-guidance": {"coerce_one'),
        (lambda: {"type": "objekt"}, "at #: Invalid type: objekt; types are string, number,"),
        (lambda: {"$ref": "http://example.com/x.json"}, "is another document, and none is fetched; put it into"),
        (lambda: {"type": "integer", "minimum": "3"}, 'minimum is "3"; give a number'),
        (lambda: Structured.regex(r"a\bb"), r"^the regular expression cannot be compiled: word boundaries .* in a\\bb"),
        (lambda: Structured.regex("a$b"), r"compiled: \^ and \$ may stand at the ends of a pattern only, in a\$b; le"),
        (lambda: Structured.grammar("start: /a^b/"),
         r"\^ and \$ may stand at the ends .*, in a\^b; leave out the others, and \(\?m\)\n +1 \| start: /a\^b/\n +\^"),
        (lambda: {"pattern": "a$b", "type": "string"}, r"at #: \^ and \$ may stand at the ends .*, in a\$b;"),
        (lambda: pydantic.create_model("Tags", tags=(set[str], ...)),
         r'"uniqueItems"; leave it out \(in pydantic: take list'),
        (lambda: pydantic.create_model("Raw", raw=(bytes, ...)),
         r"'binary' is not known; leave it out \(in pydantic: take str"),
        (lambda: {"multipleOf": 0}, "at #/multipleOf: 0 is not above 0"),
        (lambda: {"not": {}}, 'not supported: "not"; leave them out and check the answer'),
        (lambda: {"type": "string", "format": "nope"}, "the format 'nope' is not known; leave it out"),
        (lambda: Structured.grammar("start: " + "(" * 99 + '"a"' + ")" * 99), "too deep; give the inner ones rules"),
        (lambda: Structured.grammar('start: "a" %json ' + json.dumps(deep(130))), "is nested too deep; at most 126"),
        (lambda: Structured.grammar("start: " + " | ".join(f'"{i}"' for i in range(50_000))),
         "too many symbols, at most 40000 are compiled; make it smaller"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_where_and_what_to_do(grammars, make, message):
    with pytest.raises(GrammarError, match=message) as caught:
        grammars.constraint(Structured.of(make()), (0,))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("given", [list[int], pydantic.TypeAdapter(int), int | None, dict[str, int]], ids=str)
def test_a_type_that_is_no_model_has_a_way_out(given):
    for make in (Structured.json_schema, Structured.of):
        with pytest.raises(GrammarError, match=r"pydantic\.TypeAdapter\(\.\.\.\)\.json_schema\(\) of another type"):
            make(given)


def test_the_name_of_a_file_is_not_its_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "form").write_text("{}")
    for make in (Structured.json_schema, Structured.grammar):
        for given in ("sch.json", "a/good.lark", "form", tmp_path / "form"):
            with pytest.raises(
                GrammarError, match=r"is the name of a file; give its text: Path\('.*'\)\.read_text\(\)"
            ):
                make(given)
    for make in (Structured.of_schema, Structured.of_grammar):  # strangers are not told which files there are
        with pytest.raises(GrammarError, match="no JSON") if make == Structured.of_schema else nullcontext():
            make("form")
    assert Structured.grammar('start: "x.json"').kind == "grammar"
    with pytest.raises(GrammarError, match="no JSON: Expecting value in line 1, column 1"):
        Structured.json_schema("a schema in .json")


def test_properties_that_are_required_somewhere_are_not_counted(grammars):
    names = [f"p{i}" for i in range(MAX_OPTIONAL + 1)]
    wide = optional(len(names), additionalProperties=False)
    grammars.constraint(Structured.json_schema(wide | {"required": names}), (0,))


def test_what_is_said_of_a_text_that_cannot_be_followed():
    said = "Parser Error: Current row has 2807 items; max is 2000; consider making your grammar left-recursive"
    assert followed(said + "<non-verbose/>").startswith("it has too many ways to go on (2807; at most 2000); make it")
    assert followed(" other ") == "other; make it simpler"


def test_oneof_may_be_taken_for_anyof(grammars):
    schema = {"oneOf": [{"type": "string"}, {"maxLength": 3, "type": "string"}]}
    grammars.constraint(Structured.json_schema(schema | {"x-guidance": {"coerce_one_of": True}}), (0,))


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"propertys": {}}, r"'propertys' at # \(did you mean 'properties'\?\)"),
        (
            {"properties": {"a": {"type": "string", "maxlength": 3}}},
            r"'maxlength' at #/properties/a \(did you mean 'maxLen",
        ),
        ({"anyOf": [{"nullable": True}]}, "'nullable' at #/anyOf/0$"),
        ({name: 1 for name in ("aa", "bb", "cc", "dd", "ee")}, "'cc' at # and 2 more$"),
    ],
)
def test_keywords_that_mean_nothing_are_told(schema, message):
    for given in (schema, json.dumps(schema)):
        with pytest.warns(SchemaWarning, match=message):
            Structured.json_schema(given)
    with pytest.warns(SchemaWarning, match=message):
        SamplingParams(structured=schema)


def test_notes_and_what_references_lead_to_are_not_told():
    class Item(pydantic.BaseModel):
        """What is kept."""

        name: str = pydantic.Field(title="Name", examples=["a"], deprecated=True)
        kind: list[int] | None = None

    notes = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "a",
        "$comment": "",
        "title": "",
        "x-own": 1,
    }
    fields = {"default": 1, "examples": [{"odd": 1}], "readOnly": True, "writeOnly": True, "format": "date", "const": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Structured.json_schema(Item)
        Structured.json_schema(notes | {"properties": {"propertys": fields}})
        Structured.json_schema({"$ref": "#/stuff/x", "stuff": {"x": {"type": "null"}}})
        Structured.of_schema({"propertys": {}})  # a stranger's


def test_a_form_is_checked_before_there_is_a_vocabulary():
    for form, message in (
        (Structured.regex("(ab"), r"unclosed group at '\(' in '\(ab'"),
        (Structured.grammar("start: nowhere"), "nowhere"),
        (Structured.json_schema({"items": {"type": "strng"}}), "at #/items: .*strng"),
    ):
        with pytest.raises(GrammarError, match=message):
            check_form(form)
    for form in (Structured.grammar('start: <tool> "a" <[33]>'), Structured.choice(["a"])):
        check_form(form)
