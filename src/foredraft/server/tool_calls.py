"""Tool calls as OpenAI shows them, and which text of a stream may be shown before it is known to be a call or not.

Knows texts and calls; of how a model writes them only the characters that may begin one, and what is before a name.
"""

import re
import secrets
from dataclasses import dataclass
from typing import Any

from foredraft.server.service import Finished
from foredraft.structured.calls import ToolCall

Json = dict[str, Any]
OPENINGS = "{<["  # of a call in every way that is known: JSON, a mark before JSON, a list of calls


def message(one: Finished) -> Json:
    """An assistant's turn: its words, or its calls and the words before them."""
    shown: Json = {"role": "assistant", "content": one.text, "refusal": None}
    if one.reasoning:
        shown["reasoning_content"] = one.reasoning
    if not one.tool_calls:
        return shown
    words = words_before(one.tool_calls[0], one.text) if one.words is None else one.words
    return shown | {"content": words.strip() or None, "tool_calls": calls(one)}


def finish_reason(one: Finished) -> str:
    return "tool_calls" if one.tool_calls and one.finish_reason == "stop" else one.finish_reason


def calls(one: Finished) -> list[Json]:
    return [
        {
            "id": secrets.token_hex(5)[:9],  # Mistral's templates take nothing but nine letters and digits
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments_json},
        }
        for call in one.tool_calls
    ]


def words_before(call: ToolCall, text: str) -> str:
    """What a text says before the JSON of a call, or its name and JSON, and the mark that opens it."""
    name, arguments = re.escape(call.name), re.escape(call.arguments_json)
    found = re.search(
        rf'{{\s*"name"\s*:\s*"{name}"\s*,\s*"(arguments|parameters)"\s*:\s*{arguments}'
        rf"|(?<![\w.-]){name}\s*(\[CALL_ID\]\s*\w*\s*)?(\[ARGS\]\s*)?{arguments}",
        text,
    ) or re.search(rf'{{\s*"name"\s*:\s*"{name}"', text)  # arguments as text within the JSON
    end = found.start() if found else _opening(text)
    return re.sub(r"(<[^<>]*>\s*|\[[A-Z_]+\]\s*)?\[?\s*$", "", text[:end])


def _opening(text: str) -> int:
    """Where a call may begin, at the earliest."""
    return next((i for i, char in enumerate(text) if char in OPENINGS), len(text))


@dataclass(slots=True)
class Withheld:
    """A stream's text from where it may begin a call; shown at the end, if it was none."""

    text: str = ""
    shown: int = 0  # characters before it

    def take(self, text: str, *, calling: bool = False) -> str:
        """What of this may be shown now; nothing where the mark of a call, which has no text, has come."""
        shown = "" if self.text or calling else text[: _opening(text)]
        self.text += text[len(shown) :]
        self.shown += len(shown)
        return shown

    def ending(self, one: Finished) -> Json:
        """What the last chunk of a stream adds: calls, or the text that was held back."""
        if one.tool_calls:
            words = words_before(one.tool_calls[0], self.text) if one.words is None else one.words[self.shown :]
            made = {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls(one))]}
            return made | ({"content": words} if words else {})
        return {"content": self.text} if self.text else {}
