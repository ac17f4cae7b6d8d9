"""Tool calls as models write them: the ways of chat templates, and reading calls back from a text.

Told apart by what the template says: Hermes and Qwen (`<tool_call>` around JSON), Llama 3 (JSON alone) and Mistral
(`[TOOL_CALLS]` before a JSON list; in newer ones before each name, which `[ARGS]` and JSON follow).
"""

import json
import math
import re
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

from foredraft.errors import RequestError
from foredraft.text.prompt import check_unicode

Member = tuple[Any, str]  # a value of JSON, and how it is written


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for.

    Numbers in `arguments` are what `json.loads` makes of them, but a Decimal where that would be infinite or refused.
    `arguments_json` is how the model wrote them, every digit kept.
    """

    name: str
    arguments: dict[str, Any]
    arguments_json: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.arguments_json:
            object.__setattr__(self, "arguments_json", json.dumps(self.arguments, ensure_ascii=False))


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
NAME = re.compile(r"[\w.-]{1,64}")  # of a tool; nothing that a mark or JSON begins with
PARTED = re.compile(rf"(?P<name>{NAME.pattern})\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\]\s*|(?=\{{))")
SPACE = " \t\r\n"  # of JSON
SPACES = frozenset(SPACE)
BEGINNING = re.compile(r"\[?[ \t\r\n]*\{")  # of JSON that may be a call
HALF = re.compile(r"[\ud800-\udfff]|\\u[dD][89a-fA-F]")  # of a surrogate pair, as it is or escaped
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


def read_calls(text: str, style: CallStyle | None) -> tuple[ToolCall, ...]:
    """The calls in an answer, special tokens included in its text. What is cut off or malformed is no call.

    Models that no grammar holds to the template write some things in ways of their own; those are read too.
    """
    if style is None:
        return ()
    calls: list[ToolCall] = []
    rest = text.strip(SPACE).removeprefix(PYTHON_TAG) if not style.opening else _after(style.opening, text)
    while rest:
        found, rest = _calls_at(rest.strip(SPACE), style)
        calls += found
        rest = _after(style.opening, rest) if style.opening else rest.strip(SPACE).removeprefix(";")
    return tuple(calls)


def _after(mark: str, text: str) -> str:
    return text.partition(mark)[2]


def _calls_at(text: str, style: CallStyle) -> tuple[list[ToolCall], str]:
    """What the text begins with, a name and its arguments or JSON, and the rest: a mark within a call opens none."""
    named = PARTED.match(text) if style.parted else None
    start = named.end() if named else 0
    if (style.parted and not named) or not BEGINNING.match(text, start):
        return [], text if style.opening else ""
    try:
        if named:
            value, end = JSON.raw_decode(text, start)
            found = _call({"name": (named["name"], ""), "arguments": (value, text[start:end])})
        else:
            found, end = _listed(text) if text[0] == "[" else _alone(text, 0)
    except (ValueError, RecursionError):
        return [], ""
    return found, text[end:]


def _listed(text: str) -> tuple[list[ToolCall], int]:
    """The calls in the JSON list that the text begins with, and its end. Raises ValueError where there is none."""
    calls: list[ToolCall] = []
    at, closed = _past(text, 0, "["), False
    while not closed:
        found, at = _alone(text, at)
        calls += found
        at, closed = _next(text, at, "]")
    return calls, at


def _alone(text: str, at: int) -> tuple[list[ToolCall], int]:
    """The call that the JSON at a place is, if it is one, and its end."""
    if not text.startswith("{", at):
        return [], JSON.raw_decode(text, at)[1]
    members, end = _members(text, at)
    return _call(members), end


def _members(text: str, at: int) -> tuple[dict[str, Member], int]:
    """What is in the JSON object at a place, and its end. Raises ValueError where there is none."""
    members: dict[str, Member] = {}
    at, closed = _past(text, at, "{"), False
    if text.startswith("}", at):
        return members, at + 1
    while not closed:
        key, at = JSON.raw_decode(text, at)
        if not isinstance(key, str):
            raise ValueError(f"no name of a member at {at}")
        at = _past(text, _past(text, at), ":")
        value, end = JSON.raw_decode(text, at)
        members[key] = value, text[at:end]
        at, closed = _next(text, end, "}")
    return members, at


def _past(text: str, at: int, sign: str = "") -> int:
    """The place behind a sign and the space that follows it."""
    if not text.startswith(sign, at):
        raise ValueError(f"no {sign!r} at {at}")
    at += len(sign)
    while text[at : at + 1] in SPACES:
        at += 1
    return at


def _next(text: str, at: int, closing: str) -> tuple[int, bool]:
    """The place behind what follows a value, a comma or what closes; and whether it was that."""
    at = _past(text, at)
    return (at + 1, True) if text.startswith(closing, at) else (_past(text, at, ","), False)


def _call(members: dict[str, Member]) -> list[ToolCall]:
    """The call that this is, if it is one; arguments by either name, and written as text within the JSON."""
    name, _ = members.get("name", (None, ""))
    arguments, source = members.get("arguments") or members.get("parameters") or (None, "")
    if isinstance(arguments, str):
        arguments, source = _within(arguments.strip(SPACE))
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return []
    if HALF.search(source) or HALF.search(name):
        try:
            check_unicode((name, arguments, source), "a call")
        except RequestError:  # a lone surrogate, which no UTF-8 can hold
            return []
    return [ToolCall(name, arguments, source)]


def _within(text: str) -> Member:
    """The JSON that a text begins with; None where there is none."""
    try:
        value, end = JSON.raw_decode(text)
    except (ValueError, RecursionError):
        return None, ""
    return value, text[:end]


def _integer(text: str) -> int | Decimal:
    try:
        return int(text)
    except ValueError:  # more digits than Python reads, or would write
        return Decimal(text)


def _number(text: str) -> float | Decimal | str:
    """The nearest float; what is beyond them is a Decimal, and stays a text where it is beyond those too."""
    value = float(text)
    if math.isfinite(value):
        return value
    try:
        exact = Decimal(text)
    except InvalidOperation:
        return text
    return exact if exact.is_finite() else text


def _no_json(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


JSON = json.JSONDecoder(parse_int=_integer, parse_float=_number, parse_constant=_no_json)
