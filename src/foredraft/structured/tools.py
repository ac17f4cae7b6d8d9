"""Tool calls: the tools that a chat may call, and the grammar in which its model's template writes calls."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import get_json_schema

from foredraft.errors import GrammarError, LateError, RequestError
from foredraft.structured.calls import ARGS, CALL_ID, NAME, PYTHON_TAG, CallStyle, ToolCall, call_style, read_calls
from foredraft.structured.compile import Grammars, check_form
from foredraft.structured.source import JSON_FORM
from foredraft.structured.spec import Structured, closing

Tool = Mapping[str, Any] | Callable[..., Any]
ToolChoice = str | Mapping[str, Any]
MODES = ("auto", "none", "required")
Term = Callable[[str], str]  # how a grammar writes a mark, which may be a token of its own


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
            "in a way that is known (Hermes, Llama 3, Mistral); where it shows tools at all use tool_choice='auto', "
            "else another model"
        )
    chosen = functions if wanted in MODES else {wanted: functions[wanted]}
    several = several and style.repeats and wanted in MODES
    return Structured.grammar(_grammar(list(chosen.values()), wanted, style, term, several=several))


def _by_name(tools: Sequence[Tool]) -> dict[str, Mapping[str, Any]]:
    """Raises RequestError for names that could mean something else too."""
    functions: dict[str, Mapping[str, Any]] = {}
    for function in map(_function, tools):
        name = function["name"]
        if not NAME.fullmatch(name):
            raise RequestError(
                f"the tool name {name!r:.200} is not usable; give 1 to 64 letters, digits, underscores, dots and dashes"
            )
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
    schema: Any = _described(tool) if callable(tool) else tool
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


def _described(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Raises RequestError for a function that does not say enough of itself."""
    name = getattr(function, "__name__", None) or repr(function)
    try:
        return get_json_schema(function)
    except Exception as error:  # transformers and inspect have errors of their own for each thing that is missing
        why = " ".join(str(error).split()).removeprefix(f"Cannot generate JSON schema for {name} because ").rstrip(".!")
        raise RequestError(
            f"the tool {name!r:.200} cannot be described to the model: {why}; give the function a docstring with a "
            "line for each argument under 'Args:', and each argument a type hint, or pass a JSON schema in its place"
        ) from error


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
    uncalled = f"TEXT: /(.|\\n)*/ & ~/{_calling(style)}(.|\\n)*/"  # it cannot be read as a call
    if not style.opening:
        return f"start: {opened} | TEXT\n{uncalled}"
    mark = term(style.opening)
    if mark.startswith("<"):  # a token of its own, which may be spelled in others
        return f"start: TEXT | TEXT {mark} {opened}\n{uncalled}"
    return f"start: text | head {opened}\ntext: TEXT\nhead[lazy]: TEXT {mark}\nTEXT: /(.|\\n)*/"


def _calling(style: CallStyle) -> str:
    """A pattern of the beginnings of texts in which a call would be read."""
    if style.opening:
        return rf"(.|\n)*{re.escape(style.opening)}"
    return rf"[ \t\r\n]*({re.escape(PYTHON_TAG)})?[ \t\r\n]*\[?[ \t\r\n]*\{{"


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


def _check_parameters(name: str, function: Mapping[str, Any], cause: GrammarError) -> None:
    try:
        check_form(Structured.of_schema(_arguments_schema(function)))
    except GrammarError as error:
        raise GrammarError(f"the parameters of tool {name!r}: {error}") from cause


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
        self.tokenizer, self.choice = tokenizer, _choice(choice)
        self.shown = [] if self.choice == "none" else list(tools)  # what the template renders
        self.style = call_style(str(tokenizer.get_chat_template())) if self.shown and tokenizer.chat_template else None
        self.functions = _by_name(tools)
        self.form = None if grammars is None else call_form(tools, choice, self.style, grammars.mark, several=several)
        self.most = None if several else 1

    def beside(self, structured: object) -> object:
        """The form to ask for. Raises RequestError where the user asked for one already."""
        if self.form is not None and structured is not None:
            raise RequestError(
                "structured contradicts tools (over HTTP: response_format or structured_outputs): a call has its own "
                "form; drop one of them, or use tool_choice='none'"
            )
        return structured if self.form is None else self.form

    @property
    def mark(self) -> int | None:
        """The special token that opens a call; None where it is text, or there is none."""
        opening = self.style.opening if self.style else ""
        added = self.tokenizer.added_tokens_decoder
        return next((i for i, token in added.items() if token.special and token.content == opening), None)

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """A grammar of calls that is refused inside: the tool whose parameters are refused alone is named."""
        try:
            yield
        except LateError:
            raise
        except GrammarError as error:
            for name, function in self.functions.items() if self.form else ():
                if self.choice in (*MODES, name):
                    _check_parameters(name, function, error)
            raise

    def read(self, token_ids: list[int]) -> tuple[ToolCall, ...]:
        """The calls of these tools in an answer; the first, where there may be no more."""
        if self.style is None:
            return ()
        marked = bool(self.style.opening)  # marks may be special tokens
        text = self.tokenizer.decode(token_ids, skip_special_tokens=not marked, clean_up_tokenization_spaces=False)
        calls = read_calls(str(text), self.style)
        return tuple(call for call in calls if call.name in self.functions)[: self.most]
