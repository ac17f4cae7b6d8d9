"""What a server shows of a text with tool calls: the words before the first call, whole and streamed."""

import pytest

pytest.importorskip("fastapi")

from foredraft.server.service import Finished
from foredraft.server.tool_calls import Withheld, message
from foredraft.stats import SpecStats
from foredraft.structured.tools import ToolCall

WORDS = "If 3 < 4 [it is], I search:\n"
CALLS = [
    '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>',
    '{"name": "search", "parameters": {}}',
    '[{"name": "search", "arguments": {}}]',  # behind a mark that is a special token
    '[TOOL_CALLS] [{"name": "search", "arguments": {}}]',
    "[TOOL_CALLS]search[ARGS]{}",
]


def finished(text: str, *calls: ToolCall) -> Finished:
    return Finished(text, "stop", 1, 0, SpecStats(), 0.0, tool_calls=calls)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("words", ["", WORDS])
def test_words_before_a_call_are_kept(words: str, call: str) -> None:
    one = finished(words + call, ToolCall("search", {}))
    assert message(one)["content"] == (words.strip() or None)
    stream = Withheld()
    shown = "".join(stream.take(letter) for letter in one.text)
    ending = stream.ending(one)
    assert (shown + ending.get("content", "")).strip() == words.strip()
    assert ending["tool_calls"][0]["function"]["name"] == "search"


def test_what_was_no_call_is_shown_whole() -> None:
    one, stream = finished(WORDS), Withheld()
    shown = "".join(stream.take(letter) for letter in WORDS)
    assert shown + stream.ending(one)["content"] == WORDS == message(one)["content"]
