"""Tool calls: the grammar in which a model's chat template writes them, and reading them back.

Told apart by what the template says: Hermes and Qwen (`<tool_call>` around JSON), Llama 3 (JSON alone) and Mistral
(`[TOOL_CALLS]` before a JSON list; in newer ones before each name, which `[ARGS]` and JSON follow).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import get_json_schema

from foredraft.errors import RequestError
from foredraft.structured.compile import Grammars
from foredraft.structured.source import JSON_FORM
from foredraft.structured.spec import Structured, closing

Tool = Mapping[str, Any] | Callable[..., Any]
ToolChoice = str | Mapping[str, Any]
MODES = ("auto", "none", "required")
Term = Callable[[str], str]  # how a grammar writes a mark, which may be a token of its own


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How calls are written: marks around all of them, around each, and the key of the arguments."""

    opening: str
    arguments: str = "arguments"
    before: str = ""  # between the opening mark and the JSON
    after: str = ""  # between the JSON and the closing mark
    closing: str = ""
    between: str = ""  # two calls; empty where there can be but one
    listed: bool = False  # one opening for a JSON list of calls
    parted: bool = False  # the name stands before the JSON, which is the arguments alone
    ident: bool = False  # between them an identifier of nine letters and digits

    @property
    def repeats(self) -> bool:
        """Whether there can be several calls."""
        return bool(self.between) or self.parted


HERMES = CallStyle("<tool_call>", before="\n", after="\n", closing="</tool_call>", between="\n")
LLAMA = CallStyle("", arguments="parameters")
MISTRAL = CallStyle("[TOOL_CALLS]", between=", ", listed=True)
MISTRAL_SPACED = CallStyle("[TOOL_CALLS]", before=" ", between=", ", listed=True)
MISTRAL_ARGS = CallStyle("[TOOL_CALLS]", parted=True)
MISTRAL_ID = CallStyle("[TOOL_CALLS]", parted=True, ident=True)
ARGS, CALL_ID = "[ARGS]", "[CALL_ID]"
PARTED = re.compile(r"(?P<name>[^\n{\[]+?)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\]\s*|(?={))")
PYTHON_TAG = "<|python_tag|>"  # Llama 3.1 may open a call by it


def call_style(template: str) -> CallStyle | None:
    """How a chat template writes calls; None where it does not, or in a way that is not known."""
    if "<tool_call>" in template and '"arguments": ' in template.replace("\\", ""):
        return HERMES
    if "[TOOL_CALLS]" in template:
        if ARGS in template:
            return MISTRAL_ID if CALL_ID in template else MISTRAL_ARGS
        listed = MISTRAL_SPACED if "[TOOL_CALLS] [" in template else MISTRAL
        return None if CALL_ID in template else listed
    if '"parameters": ' in template and "tool_calls" in template and "<function" not in template:
        return LLAMA
    return None


def call_form(
    tools: Sequence[Tool], choice: ToolChoice, style: CallStyle | None, term: Term, *, several: bool = True
) -> Structured | None:
    """The form of an answer that may, must or must not call, perhaps several times; None: free text.

    Raises:
        RequestError: the choice is not one, names no tool, or the model's template does not say how calls are written.
    """
    wanted = _choice(choice)
    functions = _by_name(tools)
    if wanted not in MODES and wanted not in functions:
        known = ", ".join((*MODES, *functions))
        raise RequestError(f"tool_choice={choice!r} is not usable; give one of {known}")
    if wanted == "none" or not functions:
        if wanted == "required":
            raise RequestError("tool_choice='required' needs tools; pass some")
        return None
    if style is None:
        if wanted == "auto":
            return None
        raise RequestError(
            f"tool_choice={choice!r}: this model's chat template does not say how calls are written, or not "
            "in a way that is known (Hermes, Llama 3, Mistral); use tool_choice='auto'"
        )
    chosen = functions if wanted in MODES else {wanted: functions[wanted]}
    several = several and style.repeats and wanted in MODES
    return Structured.grammar(_grammar(list(chosen.values()), wanted, style, term, several=several))


def _by_name(tools: Sequence[Tool]) -> dict[str, Mapping[str, Any]]:
    """Raises RequestError for names that could mean something else too."""
    functions: dict[str, Mapping[str, Any]] = {}
    for function in map(_function, tools):
        name = function["name"]
        if name in functions:
            raise RequestError(f"two tools have the name {name!r}; give each its own")
        if name in MODES:
            raise RequestError(f"the tool name {name!r} means something else as a tool_choice; give it another name")
        functions[name] = function
    return functions


def _choice(choice: object) -> str:
    """The choice, or the name in OpenAI's {"type": "function", "function": {"name": ...}}."""
    if isinstance(choice, Mapping):
        choice = (choice.get("function") or choice).get("name")
    if not isinstance(choice, str):
        raise RequestError(f"tool_choice={choice!r} is not usable; give 'auto', 'none', 'required' or a tool's name")
    return choice


def _function(tool: Tool) -> Mapping[str, Any]:
    """Name and parameters, from OpenAI's form, from the function part of it, or from a documented Python function."""
    schema: Any = get_json_schema(tool) if callable(tool) else tool
    function = schema.get("function", schema) if isinstance(schema, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(
            f"the tool {tool!r:.200} has no name; give {{'type': 'function', 'function': {{'name': ...}}}}"
        )
    parameters = function.get("parameters")
    if parameters and not isinstance(parameters, Mapping):
        raise RequestError(f"the parameters of tool {function['name']!r} are no JSON schema")
    kinds = (parameters or {}).get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise RequestError(f"the parameters of tool {function['name']!r} are of type {kinds!r}; they must be an object")
    return function


def _grammar(
    functions: Sequence[Mapping[str, Any]], wanted: str, style: CallStyle, term: Term, *, several: bool
) -> str:
    """The grammar of an answer, in llguidance's Lark."""
    bodies = {f"call_{i}": _body(function, style, term) for i, function in enumerate(functions)}
    rules = [f"{name}: {body}" for name, body in bodies.items()]
    rules.append("body: " + " | ".join(bodies))
    between = json.dumps(style.between) if style.between else ""
    if style.listed:
        rest = f"({between} body)*" if several else ""
        rules.append(f'calls: {json.dumps(style.before + "[")} body {rest} "]"')
        opened = "calls"
    else:
        closing = f"{json.dumps(style.after)} {term(style.closing)}" if style.closing else ""
        rules.append(f"inner: {json.dumps(style.before) if style.before else ''} body {closing}")
        rest = f"({between} {term(style.opening)} inner)*" if several else ""
        opened = f"inner {rest}"
    return "\n".join((_start(opened, wanted, style, term), *rules))


def _start(opened: str, wanted: str, style: CallStyle, term: Term) -> str:
    """The first rule: calls, or where the model may choose, free text up to the opening mark."""
    if wanted != "auto":
        return f"start: {term(style.opening) if style.opening else ''} {opened}"
    if not style.opening:
        return f"start: {opened} | TEXT\nTEXT: /([^{{](.|\\n)*)?/"
    mark = term(style.opening)
    if mark.startswith("<"):  # a token of its own: no text can be mistaken for it
        return f"start: TEXT | TEXT {mark} {opened}\nTEXT: /(.|\\n)*/"
    return f"start: text | head {opened}\ntext: TEXT\nhead[lazy]: TEXT {mark}\nTEXT: /(.|\\n)*/"


def _body(function: Mapping[str, Any], style: CallStyle, term: Term) -> str:
    """One call's JSON object, or its name and the JSON of its arguments."""
    name = json.dumps(function["name"], ensure_ascii=False)
    schema = json.dumps(_arguments_schema(function), ensure_ascii=False)
    if style.parted:
        ident = f"{term(CALL_ID)} /[A-Za-z0-9]{{9}}/ " if style.ident else ""
        return f"{name} {ident}{term(ARGS)} %json {schema}"
    head = f'{{"name": {name}, "{style.arguments}": '
    return f'{json.dumps(head, ensure_ascii=False)} %json {schema} "}}"'


def _arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """Of an object whatever else it says; without parameters there is nothing in it, with `{}` for them anything."""
    parameters = function.get("parameters")
    parameters = parameters if isinstance(parameters, Mapping) else {"properties": {}}
    return {"x-guidance": JSON_FORM, **closing(parameters), **parameters, "type": "object"}


class Calling:
    """Which tools one chat may call, and how its model writes that."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        grammars: Grammars | None,
        tools: Sequence[Tool],
        choice: ToolChoice,
        *,
        several: bool = True,
    ) -> None:
        if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
            raise RequestError(f"tools={tools!r:.200} is not usable; give a list of functions or their descriptions")
        self.tokenizer = tokenizer
        self.shown = [] if _choice(choice) == "none" else list(tools)  # what the template renders
        self.style = call_style(str(tokenizer.get_chat_template())) if self.shown and tokenizer.chat_template else None
        self.form = None if grammars is None else call_form(tools, choice, self.style, grammars.mark, several=several)
        self.most = None if several else 1

    def beside(self, structured: object) -> object:
        """The form to ask for. Raises RequestError where the user asked for one already."""
        if self.form is not None and structured is not None:
            raise RequestError("structured contradicts tools: a call has its own form; use tool_choice='none'")
        return structured if self.form is None else self.form

    def read(self, token_ids: list[int]) -> tuple[ToolCall, ...]:
        """The calls in an answer; the first, where there may be no more."""
        if self.style is None:
            return ()
        marked = bool(self.style.opening)  # marks may be special tokens
        text = str(self.tokenizer.decode(token_ids, skip_special_tokens=not marked))
        return read_calls(text, self.style)[: self.most]


def read_calls(text: str, style: CallStyle | None) -> tuple[ToolCall, ...]:
    """The calls in an answer, special tokens included in its text. What is cut off or malformed is no call.

    Models that no grammar holds to the template write some things in ways of their own; those are read too.
    """
    if style is None:
        return ()
    values: list[Any] = []
    rest = text.strip().removeprefix(PYTHON_TAG) if not style.opening else _after(style.opening, text)
    while rest:
        found, rest = _values_at(rest.strip(), style)
        values += found
        rest = _after(style.opening, rest) if style.opening else rest.strip().removeprefix(";")
    return tuple(call for value in values for call in _call(value))


def _after(mark: str, text: str) -> str:
    return text.partition(mark)[2]


def _values_at(text: str, style: CallStyle) -> tuple[list[Any], str]:
    """What the text begins with, a name and its arguments or JSON, and the rest: a mark within a call opens none."""
    named = PARTED.match(text) if style.parted else None
    start = named.end() if named else 0
    if (style.parted and not named) or not text.startswith(("{", "["), start):
        return [], text if style.opening else ""
    value, rest = _json_at(text[start:])
    if named:
        value = {"name": named["name"], "arguments": value}
    return value if isinstance(value, list) else [value], rest


def _call(found: Any) -> tuple[ToolCall, ...]:
    """The call that this is, if it is one; arguments by either name, and written as text within the JSON."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return ()
    arguments = found.get("arguments", found.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json_at(arguments.strip())[0]
    return (ToolCall(found["name"], arguments),) if isinstance(arguments, dict) else ()


def _json_at(text: str) -> tuple[Any, str]:
    """What the text begins with, and the rest; None where that is no JSON."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, ""
    return value, text[end:]
