"""Tool calls: forced, free and refused, in each way of writing them, and read back as they were written."""

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from foredraft import LLM, SamplingParams
from foredraft.errors import RequestError
from foredraft.llm import BUNDLED
from foredraft.structured.compile import Grammars
from foredraft.structured.tools import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    MISTRAL_ID,
    ToolCall,
    call_form,
    call_style,
    read_calls,
)

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
    with pytest.raises(RequestError, match="no JSON schema"):
        call_form([{"name": "x", "parameters": 3}], "auto", HERMES, repr)


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
    (MISTRAL, f"[TOOL_CALLS][{CALL}]".replace("KEY", "arguments"), ("auto", "required", "find_restaurant"), (OAKLAND,)),
    (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]".replace("KEY", "arguments"), ("auto", "required"), (OAKLAND, OAKLAND)),
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


def test_templates_say_which_way(shared):
    folder = shared / "data" / "chat_templates"
    assert call_style((folder / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text()) is HERMES
    assert call_style((folder / "meta-llama-Llama-3.1-8B-Instruct.jinja").read_text()) is LLAMA
    assert call_style("{% for m in messages %}{{ m.content }}{% endfor %}") is None
    assert call_style("[TOOL_CALLS] [{{ call }}]") is MISTRAL
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
