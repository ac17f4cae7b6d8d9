"""Tool calls: forced, free and refused, in each way of writing them, and read back as they were written."""

import copy
import json
from decimal import Decimal
from functools import partial

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from foredraft import LLM, SamplingParams
from foredraft.errors import GrammarError, RequestError
from foredraft.llm import BUNDLED
from foredraft.structured.calls import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    MISTRAL_ID,
    MISTRAL_SPACED,
    ToolCall,
    call_style,
    read_calls,
)
from foredraft.structured.compile import Grammars
from foredraft.structured.tools import Calling, call_form

pytest.importorskip("llguidance")
FIND = {
    "type": "function",
    "function": {
        "name": "find_restaurant",
        "description": "Find a restaurant.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oakland", "Berkeley"]}, "people": {"type": "integer", "maximum": 9}},
            "required": ["city"],
        },
    },
}
NOW = {"name": "now"}
OAKLAND = ToolCall("find_restaurant", {"city": "Oakland"})
CALL = '{"name": "find_restaurant", "KEY": {"city": "Oakland"}}'
ARGS_CALL = '[TOOL_CALLS]find_restaurant[ARGS]{"city": "Oakland"}'
ID_CALL = ARGS_CALL.replace("[ARGS]", "[CALL_ID]a1B2c3D4e[ARGS]")
TEMPLATE = (
    '{% if tools %}<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    "{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
)
MESSAGES = [{"role": "user", "content": "A table in Oakland?"}]


@pytest.fixture(scope="module")
def tokenizer():
    made = AutoTokenizer.from_pretrained(BUNDLED / "target")
    marks = [AddedToken(mark, special=False) for mark in ("<tool_call>", "</tool_call>")]
    specials = [AddedToken(mark, special=True) for mark in ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")]
    made.add_tokens([*marks, *specials])
    return made


@pytest.fixture(scope="module")
def llm() -> LLM:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "target")
    tokenizer.chat_template = TEMPLATE
    return LLM(BUNDLED / "target", BUNDLED / "draft", tokenizer=tokenizer)


def without_docstring(city: str): ...


def without_entry(city: str):
    """Find a restaurant."""


def without_hint(city):
    """Find a restaurant.

    Args:
        city: Where to look.
    """


@pytest.mark.parametrize(
    "tool, why",
    [
        (without_docstring, "'without_docstring' cannot be described to the model: it has no docstring; give"),
        (without_entry, "'without_entry' cannot be .* the docstring has no description for the argument 'city'; give"),
        (
            without_hint,
            "'without_hint' cannot be .* Argument city is missing a type hint in function without_hint; give",
        ),
        (int, "'int' cannot be described to the model: no signature"),
        (partial(without_hint), r"'functools\.partial.*or pass a JSON schema in its place"),
    ],
    ids=lambda it: getattr(it, "__name__", ""),
)
def test_a_function_that_says_too_little_of_itself(llm, tool, why):
    with pytest.raises(RequestError, match=f"the tool {why}"):
        llm.chat(MESSAGES, tools=[tool])


@pytest.mark.parametrize("choice", ["required", "find_restaurant", {"type": "function", "function": {"name": "now"}}])
def test_a_forced_call_is_made_and_read_back(llm, choice):
    params = SamplingParams(temperature=0.9, seed=4, max_new_tokens=200)
    drafted = llm.chat(MESSAGES, params, tools=[FIND, NOW], tool_choice=choice)
    plain = llm.chat(MESSAGES, params, tools=[FIND, NOW], tool_choice=choice, num_draft_tokens=0)
    assert drafted.token_ids == plain.token_ids
    assert drafted.finish_reason == "stop"
    assert drafted.tool_calls
    for call in drafted.tool_calls:
        assert call.name in (choice, "now") or choice == "required"
        assert call.name == "now" or call.arguments["city"] in ("Oakland", "Berkeley")
    assert len(drafted.tool_calls) == 1 or choice == "required"


def test_no_call_where_none_may_come(llm):
    params = SamplingParams(max_new_tokens=12)
    result = llm.chat(MESSAGES, params, tools=[FIND], tool_choice="none")
    assert result.tool_calls == () and result.token_ids == llm.chat(MESSAGES, params).token_ids
    assert llm.chat(MESSAGES, params, tools=[FIND]).finish_reason in ("length", "stop")


def test_bad_choices_are_refused_before_anything_runs(llm):
    for choice, message in (("serch", "give one of auto, none, required, find_restaurant"), (3, "tool_choice=3")):
        with pytest.raises(RequestError, match=message):
            llm.chat(MESSAGES, tools=[FIND], tool_choice=choice)
    with pytest.raises(RequestError, match="needs tools"):
        llm.chat(MESSAGES, tool_choice="required")
    with pytest.raises(RequestError, match="structured contradicts tools"):
        llm.chat(MESSAGES, SamplingParams(structured={"type": "null"}), tools=[FIND])
    with pytest.raises(RequestError, match="does not say how calls are written"):
        call_form([FIND], "required", None, repr)
    with pytest.raises(RequestError, match="has no name"):
        call_form([{"type": "function"}], "auto", HERMES, repr)
    with pytest.raises(RequestError, match="two tools have the name 'now'"):
        call_form([NOW, FIND, NOW], "auto", HERMES, repr)
    with pytest.raises(RequestError, match="'required' means something else"):
        call_form([{"name": "required"}], "auto", HERMES, repr)
    with pytest.raises(RequestError, match="no JSON schema"):
        call_form([{"name": "x", "parameters": 3}], "auto", HERMES, repr)


@pytest.mark.parametrize(
    "parameters, why",
    [({"properties": {"q": {"type": "strin"}}}, "at #/properties/q: Invalid type"), ({"$ref": "#/no"}, "'/no'")],
)
def test_a_tool_whose_parameters_are_refused_is_named(llm, parameters, why):
    tools = [FIND, {"name": "wrong", "parameters": parameters}, NOW]
    with pytest.raises(GrammarError, match="the parameters of tool 'wrong': the JSON schema cannot be.*" + why):
        llm.chat(MESSAGES, tools=tools)
    unasked = {"name": "unasked", "parameters": {"properties": {"q": {"not": {}}}}}
    with pytest.raises(GrammarError, match="the parameters of tool 'wrong'"):
        llm.chat(MESSAGES, tools=[unasked, *tools], tool_choice="wrong")
    assert llm.chat(MESSAGES, SamplingParams(max_new_tokens=1), tools=[unasked, *tools], tool_choice="now").token_ids


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call.replace('KEY', 'arguments')}\n</tool_call>" for call in calls)


TEXTS = (
    (HERMES, hermes(CALL), ("auto", "required", "find_restaurant"), (OAKLAND,)),
    (HERMES, hermes(CALL, CALL), ("auto", "required"), (OAKLAND, OAKLAND)),
    (HERMES, "Let me see. " + hermes(CALL), ("auto",), (OAKLAND,)),
    (HERMES, "No call at all.", ("auto",), ()),
    (HERMES, "<tool_call>\n{broken", (), ()),
    (LLAMA, CALL.replace("KEY", "parameters"), ("auto", "required", "find_restaurant"), (OAKLAND,)),
    (LLAMA, "No call {at all}.", ("auto",), ()),
    (LLAMA, " [1] says: {}", ("auto",), ()),
    (LLAMA, " \n", ("auto",), ()),
    *(
        (LLAMA, text.replace("CALL", CALL.replace("KEY", "parameters")), (), (OAKLAND,))
        for text in (" CALL", "\r\n\tCALL", " [ CALL]", "<|python_tag|>CALL", " <|python_tag|> CALL")
    ),
    (LLAMA, "\u00a0" + CALL.replace("KEY", "parameters"), ("auto",), ()),
    (MISTRAL, f"[TOOL_CALLS][{CALL}]".replace("KEY", "arguments"), ("auto", "required", "find_restaurant"), (OAKLAND,)),
    (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]".replace("KEY", "arguments"), ("auto", "required"), (OAKLAND, OAKLAND)),
    (MISTRAL, f"[TOOL_CALLS] [{CALL}]".replace("KEY", "arguments"), (), (OAKLAND,)),
    (
        MISTRAL_SPACED,
        f"[TOOL_CALLS] [{CALL}, {CALL}]".replace("KEY", "arguments"),
        ("auto", "required"),
        (OAKLAND, OAKLAND),
    ),
    (MISTRAL_ARGS, ARGS_CALL, ("auto", "required", "find_restaurant"), (OAKLAND,)),
    (MISTRAL_ARGS, f"Well: {ARGS_CALL}{ARGS_CALL}", ("auto",), (OAKLAND, OAKLAND)),
    (MISTRAL_ARGS, "[TOOL_CALLS]find_restaurant[ARGS]{broken", (), ()),
    (
        MISTRAL_ID,
        ARGS_CALL.replace("[ARGS]", "[CALL_ID]a1B2c3D4e[ARGS]"),
        ("auto", "required", "find_restaurant"),
        (OAKLAND,),
    ),
    (MISTRAL_ID, ARGS_CALL.replace("[ARGS]", "[CALL_ID]short[ARGS]"), (), (OAKLAND,)),
)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("style, text, allowed, calls", TEXTS)
def test_each_way_of_writing_calls(tokenizer, marked, style, text, allowed, calls):
    """With marks that are tokens of their own, and with marks spelled in letters."""
    used = tokenizer if marked else AutoTokenizer.from_pretrained(BUNDLED / "target")
    grammars = Grammars(used, len(used))
    ids = used(text, add_special_tokens=False)["input_ids"]
    for choice in ("auto", "required", "find_restaurant"):
        form = call_form([FIND, NOW], choice, style, grammars.mark)
        constraint = grammars.constraint(form, (0,))
        whole = constraint.allowed([*ids, 0]) == len(ids) + 1
        assert whole == (choice in allowed), choice
    assert read_calls(used.decode(ids), style) == calls


@pytest.mark.parametrize("style, text, allowed, calls", TEXTS)
def test_without_parallel_calls_there_is_one_at_most(tokenizer, style, text, allowed, calls):
    grammars = Grammars(tokenizer, len(tokenizer))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for choice in allowed:
        form = call_form([FIND, NOW], choice, style, grammars.mark, several=False)
        whole = grammars.constraint(form, (0,)).allowed([*ids, 0]) == len(ids) + 1
        assert whole == (len(calls) < 2), choice


def test_of_calls_that_no_grammar_holds_back_the_first_is_read(tokenizer, shared):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (shared / "data" / "chat_templates" / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text()
    text = "".join(f'<tool_call>\n{{"name": "now", "arguments": {{"zone": "{z}"}}}}\n</tool_call>\n' for z in "ab")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    read = {several: Calling(tokenizer, None, [NOW], "auto", several=several).read(ids) for several in (True, False)}
    assert [call.arguments["zone"] for call in read[True]] == ["a", "b"]
    assert read[False] == read[True][:1]


def test_templates_say_which_way(shared):
    folder = shared / "data" / "chat_templates"
    assert call_style((folder / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text()) is HERMES
    assert call_style((folder / "meta-llama-Llama-3.1-8B-Instruct.jinja").read_text()) is LLAMA
    assert call_style("{% for m in messages %}{{ m.content }}{% endfor %}") is None
    assert call_style("[TOOL_CALLS] [{{ call }}]") is MISTRAL_SPACED
    assert call_style("[TOOL_CALLS][{{ call }}]") is MISTRAL
    assert call_style("[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}") is MISTRAL_ARGS
    assert call_style("[TOOL_CALLS]{{ name }}[CALL_ID]{{ id }}[ARGS]{{ arguments }}") is MISTRAL_ID
    assert call_style("[TOOL_CALLS]{{ name }}[CALL_ID]{{ id }}") is None


def test_functions_are_tools():
    def now(zone: str) -> str:
        """Tell the time.

        Args:
            zone: where
        """
        return zone

    form = call_form([now], "required", LLAMA, repr)
    assert form is not None and '"zone"' in form.source


ORDER = {
    "name": "bestellung_größe",
    "parameters": {
        "type": "object",
        "properties": {
            "gericht": {"enum": ["Käsespätzle", "寿司", 'ein "Bier"']},
            "an": {"$ref": "#/$defs/adresse"},
            "mengen": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
        },
        "required": ["gericht", "an"],
        "$defs": {
            "adresse": {
                "type": "object",
                "properties": {
                    "straße": {"type": "string", "maxLength": 9},
                    "nr": {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
                },
                "required": ["straße"],
                "additionalProperties": False,
            }
        },
    },
}
ORDERED = {"gericht": 'ein "Bier"', "an": {"straße": "A\u00df 東}", "nr": None}, "mengen": [1, 2]}


def written(style, name: str, arguments: dict) -> str:
    """A call as its template writes it."""
    inner = json.dumps(arguments, ensure_ascii=False)
    call = f'{{"name": "{name}", "{style.arguments}": {inner}}}'
    if style.parted:
        return f"[TOOL_CALLS]{name}{'[CALL_ID]a1B2c3D4e' if style.ident else ''}[ARGS]{inner}"
    if style.listed:
        return f"[TOOL_CALLS]{style.before}[{call}]"
    return call if style is LLAMA else hermes(call)


@pytest.mark.parametrize("style", [HERMES, LLAMA, MISTRAL, MISTRAL_SPACED, MISTRAL_ARGS, MISTRAL_ID])
@pytest.mark.parametrize(
    "function, arguments", [(ORDER, ORDERED), (NOW, {}), ({"name": "now", "parameters": None}, {})]
)
def test_nested_arguments_other_alphabets_and_none_at_all(tokenizer, style, function, arguments):
    grammars = Grammars(tokenizer, len(tokenizer))
    for choice in ("required", function["name"], "auto"):
        constraint = grammars.constraint(call_form([function, FIND], choice, style, grammars.mark), (0,))
        ids = tokenizer(written(style, function["name"], arguments), add_special_tokens=False)["input_ids"]
        assert constraint.allowed([*ids, 0]) == len(ids) + 1
        assert read_calls(tokenizer.decode(ids), style) == (ToolCall(function["name"], arguments),)
        more = tokenizer(written(style, "now", {"zone": 1}), add_special_tokens=False)["input_ids"]
        assert constraint.allowed([*more, 0]) <= len(more)  # of a tool without parameters, or of none that there is


@pytest.mark.parametrize(
    "style, text, calls",
    [
        (LLAMA, '<|python_tag|>{"name": "now", "parameters": {}}', [("now", {})]),
        (
            LLAMA,
            '{"name": "now", "parameters": {}}; {"name": "at", "arguments": {"x": 1}}',
            [("now", {}), ("at", {"x": 1})],
        ),
        (LLAMA, '[{"name": "now", "parameters": {}}]', [("now", {})]),
        (LLAMA, '{"name": "now", "parameters": "{\\"x\\": 1}"}', [("now", {"x": 1})]),
        (LLAMA, '{"name": "now"}', []),
        (LLAMA, '{"city": "Oakland"}', []),
        (LLAMA, '{"name": "now", "parameters": {}} or else', [("now", {})]),
        (HERMES, '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', [("now", {})]),
        (HERMES, '<tool_call>\n{"name": "now", "parameters": {}}', [("now", {})]),
        (MISTRAL, '[TOOL_CALLS]  [{"name": "a", "arguments": {}}, {"name": 3, "arguments": {}}]', [("a", {})]),
        (MISTRAL_ARGS, '[TOOL_CALLS]now{"x": {"y": []}}[TOOL_CALLS]at{}', [("now", {"x": {"y": []}}), ("at", {})]),
        (MISTRAL_ARGS, "[TOOL_CALLS]now", []),
        (
            HERMES,
            hermes('{"name": "a", "arguments": {"x": "a <tool_call> b </tool_call>"}}')
            + hermes('{"name": "b", "arguments": {}}'),
            [("a", {"x": "a <tool_call> b </tool_call>"}), ("b", {})],
        ),
        (HERMES, "I write <tool_call> first: " + hermes('{"name": "a", "arguments": {}}'), [("a", {})]),
        (HERMES, '<tool_call>{"name": "a", "arguments": {"x": "<tool_call>{\\"name\\": \\"rm\\"', []),
        (
            MISTRAL,
            '[TOOL_CALLS][{"name": "a", "arguments": {"x": "[TOOL_CALLS] y"}}]',
            [("a", {"x": "[TOOL_CALLS] y"})],
        ),
        (MISTRAL_ARGS, '[TOOL_CALLS]f[ARGS]{"x": "[TOOL_CALLS]rm[ARGS]{}"}', [("f", {"x": "[TOOL_CALLS]rm[ARGS]{}"})]),
        (MISTRAL_ARGS, "[TOOL_CALLS]now[ARGS]" + '{"x":' * 5000, []),
    ],
)
def test_what_models_say_that_no_grammar_holds(style, text, calls):
    assert read_calls(text, style) == tuple(ToolCall(*call) for call in calls)


LLAMA_TEMPLATE = (
    '{% if tools %}Respond in the format {"name": function name, "parameters": dictionary}. {{ tools | tojson }}\n'
    "{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls or '' }}\n{% endfor %}assistant: "
)
MISTRAL_TEMPLATE = (
    "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] ["
    "{{ m.tool_calls | tojson }}]{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
)


@pytest.mark.parametrize("template", [LLAMA_TEMPLATE, MISTRAL_TEMPLATE])
@pytest.mark.parametrize("choice", ["required", "bestellung_größe", "auto"])
def test_calls_in_the_other_ways_are_those_of_plain_decoding(template, choice):
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "target")
    tokenizer.chat_template = template
    llm = LLM(BUNDLED / "target", BUNDLED / "draft", tokenizer=tokenizer)
    params = SamplingParams(temperature=0.9, seed=2, max_new_tokens=250)
    drafted = llm.chat(MESSAGES, params, tools=[ORDER, NOW], tool_choice=choice)
    plain = llm.chat(MESSAGES, params, tools=[ORDER, NOW], tool_choice=choice, num_draft_tokens=0)
    assert drafted.token_ids == plain.token_ids and drafted.tool_calls == plain.tool_calls
    if choice == "auto":
        return
    assert drafted.text.startswith("[TOOL_CALLS] [{" if template is MISTRAL_TEMPLATE else '{"name": ')
    if choice != "required" or template is LLAMA_TEMPLATE:  # which end after one call
        (call,) = drafted.tool_calls
        assert drafted.finish_reason == "stop" and call.name in ("bestellung_größe", "now")
        assert call.name == "now" or call.arguments["an"]["straße"] is not None


PLACE = {"type": "object", "properties": {"q": {"type": "integer"}}, "required": ["q"]}
SHUT = PLACE | {"additionalProperties": False}
OTHER = {"properties": {"r": {"type": "integer"}}, "required": ["r"]}


@pytest.mark.parametrize(
    "parameters, good, bad",
    [
        ({"$ref": "#/$defs/A", "$defs": {"A": SHUT}}, '{"q": 1}', '{"r": 1}'),
        ({"$ref": "#/$defs/A", "$defs": {"A": SHUT}, "properties": {"q": {"maximum": 5}}}, '{"q": 1}', '{"q": 6}'),
        ({"anyOf": [PLACE, OTHER]}, '{"r": 1}', '{"s": 1}'),
        ({"type": "object", "anyOf": [SHUT, {"type": "null"}]}, '{"q": 1}', "null"),
        ({"allOf": [PLACE, OTHER]}, '{"q": 1, "r": 2}', '{"q": 1}'),
        ({"oneOf": [SHUT]}, '{"q": 1}', '{"q": 1, "r": 2}'),
        (PLACE | {"allOf": [OTHER]}, '{"r": 2, "q": 1}', '{"q": 1}'),
        ({"properties": {"q": {}, "r": {}}, "anyOf": [{"required": ["q"]}, {"required": ["r"]}]}, '{"r": 1}', "{}"),
        ({"properties": {"q": {}, "r": {}}, "anyOf": [{"required": ["q"]}]}, '{"q": 1}', '{"q": 1, "s": 2}'),
        (PLACE, '{"q": 1}', '{"q": 1, "r": 2}'),
        (PLACE | {"additionalProperties": True}, '{"q": 1, "r": 2}', "{}"),
        ({"properties": {}}, "{}", '{"q": 1}'),
        (None, "{}", '{"q": 1}'),
        ({}, '{"q": {"r": [1]}}', "[1]"),
        ({"type": "object"}, '{"q": {"r": [1]}}', "1"),
        ({"type": ["object", "null"]}, '{"q": 1}', "null"),
        ({"patternProperties": {"^q": {"type": "integer"}}}, '{"q": 1}', '{"q": "1"}'),
    ],
)
def test_what_a_tools_schema_may_have_at_its_root(parameters, good, bad):
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "target")
    grammars = Grammars(tokenizer, len(tokenizer))
    form = call_form([{"name": "f", "parameters": parameters}], "required", LLAMA, grammars.mark)
    for arguments in (good, bad):
        ids = tokenizer(f'{{"name": "f", "parameters": {arguments}}}', add_special_tokens=False)["input_ids"]
        assert (grammars.constraint(form, (0,)).allowed([*ids, 0]) == len(ids) + 1) == (arguments == good), arguments


def test_parameters_that_are_no_object_are_refused():
    for kind in ("string", ["array", "null"]):
        with pytest.raises(RequestError, match=r"parameters of tool 'f' are of type .* must be an object"):
            call_form([{"name": "f", "parameters": {"type": kind}}], "auto", HERMES, repr)


STYLES = [HERMES, LLAMA, MISTRAL, MISTRAL_SPACED, MISTRAL_ARGS, MISTRAL_ID]


@pytest.mark.parametrize("style", [style for style in STYLES if style.opening])
def test_a_mark_that_is_a_token_is_not_spelled_in_others(tokenizer, style):
    """Which would be read as a call, of any tool with any arguments."""
    grammars = Grammars(tokenizer, len(tokenizer))
    constraint = grammars.constraint(call_form([FIND], "auto", style, grammars.mark), (0,))
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in style.opening]
    ids = sum(letters, tokenizer("Well", add_special_tokens=False)["input_ids"])
    assert style.opening in tokenizer.decode(ids)
    assert constraint.allowed([*ids, 0]) == len(ids) - 1
    assert constraint.allowed([*ids[:-1], 0]) == len(ids)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "source, value",
    [
        ("1e999", Decimal("1e999")),
        ("-1E+400", Decimal("-1e400")),
        ("9" * 5000, Decimal("9" * 5000)),
        ("12345678901234567890", 12345678901234567890),
        ("12345678901234567890.5", 12345678901234567890.5),
        ("0.10", 0.1),
        ("1e99999999999999999999", "1e99999999999999999999"),
    ],
)
def test_numbers_that_the_grammar_allows_come_back(style, source, value):
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "target", model_max_length=10_000)
    grammars = Grammars(tokenizer, len(tokenizer))
    tool = {"name": "f", "parameters": {"properties": {"x": {"type": "number"}}}}
    text = written(style, "f", {"x": 0}).replace("0}", source + "}")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    form = call_form([tool], "required", style, grammars.mark)
    assert grammars.constraint(form, (0,)).allowed([*ids, 0]) == len(ids) + 1
    (call,) = read_calls(tokenizer.decode(ids), style)
    assert call.arguments == {"x": value} and type(call.arguments["x"]) is type(value)
    assert call.arguments_json == f'{{"x": {source}}}'
    repr(call)


@pytest.mark.parametrize(
    "style, text, sources",
    [
        (HERMES, hermes('{"arguments": {"x":1.0, "x": [2]}, "name": "f"}'), ['{"x":1.0, "x": [2]}']),
        (HERMES, hermes('{ "name" : "f" , "arguments" : { } }'), ["{ }"]),
        (HERMES, hermes('{"name": "f", "arguments": " {\\"x\\": 1e0} "}'), ['{"x": 1e0}']),
        (HERMES, hermes('{"name": "f", "arguments": "{"}', '{"name": "f", "arguments": {}}'), ["{}"]),
        (
            MISTRAL,
            '[TOOL_CALLS][{"name": "f", "arguments": {}} , 3,{"name": "f", "parameters": {"y": 1e1}}]',
            ["{}", '{"y": 1e1}'],
        ),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {}} {}]', []),
        (MISTRAL, '[TOOL_CALLS][{"name": "f" "arguments": {}}]', []),
        (MISTRAL, '[TOOL_CALLS][{3: "f", "arguments": {}}]', []),
        (MISTRAL_ARGS, '[TOOL_CALLS]f[ARGS]{"x" : 1}[TOOL_CALLS]f{"x":\n2}', ['{"x" : 1}', '{"x":\n2}']),
        (LLAMA, '{"name": "f", "parameters": {"x": NaN}}', []),
        (LLAMA, '{"name": "f", "parameters": {"x": -Infinity}}', []),
        (LLAMA, '{"name": "f", "parameters": {"s": "\\ud800"}}', []),
        (LLAMA, '{"name": "f", "parameters": {"\\uDFFF": 1}}', []),
        (LLAMA, '{"name": "f\\ud800", "parameters": {}}', []),
        (LLAMA, '{"name": "f", "parameters": "{\\"s\\": \\"\\ud800\\"}"}', []),
        (LLAMA, '{"name": "f", "parameters": {"s": "\\ud83d\\ude00"}}', ['{"s": "\\ud83d\\ude00"}']),
        (LLAMA, '{"name": "f", "parameters": {"s": "\\\\ud800"}}', ['{"s": "\\\\ud800"}']),
    ],
)
def test_arguments_as_the_model_wrote_them(style, text, sources):
    calls = read_calls(text, style)
    assert [call.arguments_json for call in calls] == sources
    assert [call.arguments for call in calls] == list(map(json.loads, sources))


@pytest.mark.parametrize(
    "name", ["", "a[b", "a{b", "a b", "a\nb", 'a"b', "f[ARGS]", "x ", "x\n", "</tool_call>", "a" * 65, "\ud800"]
)
def test_names_that_no_call_could_be_read_by_are_refused(tokenizer, name):
    for choice in ("auto", "none"):
        with pytest.raises(RequestError, match=r"the tool name .* is not usable; give 1 to 64 letters, digits"):
            Calling(tokenizer, None, [{"name": name}], choice)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["a.b-c_d", "3", "größe", "a" * 64])
def test_names_that_are_taken_are_read(style, name):
    (call,) = read_calls(written(style, name, {"x": "[ARGS]{}"}), style)
    assert call == ToolCall(name, {"x": "[ARGS]{}"})


def test_calls_of_other_tools_are_none(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = LLAMA_TEMPLATE
    text = '{"name": "rm", "parameters": {}}; {"name": "now", "parameters": {}}'
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for several in (True, False):
        assert Calling(tokenizer, None, [NOW], "auto", several=several).read(ids) == (ToolCall("now", {}),)
    assert Calling(tokenizer, None, [FIND], "auto").read(ids) == ()
