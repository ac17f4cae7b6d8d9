"""Tool calls as OpenAI shows them, and which text of a stream may be shown before it is known to be a call or not.

Knows texts and calls, nothing of how a model writes them but the characters that may begin one.
"""

import json
import secrets
from dataclasses import dataclass
from typing import Any

from foredraft.server.service import Finished

Json = dict[str, Any]
OPENINGS = "{<["  # of a call in every way that is known: JSON, a mark before JSON, a list of calls


def message(one: Finished) -> Json:
    """An assistant's turn: its words, or its calls and the words before them."""
    shown: Json = {"role": "assistant", "content": one.text, "refusal": None}
    if one.reasoning:
        shown["reasoning_content"] = one.reasoning
    if not one.tool_calls:
        return shown
    return shown | {"content": before_a_call(one.text).strip() or None, "tool_calls": calls(one)}


def finish_reason(one: Finished) -> str:
    return "tool_calls" if one.tool_calls and one.finish_reason == "stop" else one.finish_reason


def calls(one: Finished) -> list[Json]:
    return [
        {
            "id": secrets.token_hex(5)[:9],  # Mistral's templates take nothing but nine letters and digits
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in one.tool_calls
    ]


def before_a_call(text: str) -> str:
    return text[: next((i for i, char in enumerate(text) if char in OPENINGS), len(text))]


@dataclass(slots=True)
class Withheld:
    """A stream's text from the first character on that may begin a call; shown at the end, if it was none."""

    text: str = ""

    def take(self, text: str) -> str:
        """What of this may be shown now."""
        shown = "" if self.text else before_a_call(text)
        self.text += text[len(shown) :]
        return shown

    def ending(self, one: Finished) -> Json:
        """What the last chunk of a stream adds: calls, or the text that was held back."""
        if one.tool_calls:
            return {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls(one))]}
        return {"content": self.text} if self.text else {}
