"""What a server shows of a text with tool calls: the words before the first call, whole and streamed."""

import json

import pytest

pytest.importorskip("fastapi")

from starlette.responses import JSONResponse

from foredraft.server.service import Finished
from foredraft.server.tool_calls import Withheld, message
from foredraft.stats import SpecStats
from foredraft.structured.calls import LLAMA, ToolCall, read_calls

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


def test_arguments_are_handed_on_as_they_were_written() -> None:
    source = '{"x":1e999, "y": 12345678901234567890.5, "n": ' + "9" * 5000 + "}"
    text = f'{{"name": "search", "parameters": {source}}}'
    one, stream = finished(text, *read_calls(text, LLAMA)), Withheld()
    assert stream.take(text) == ""
    for shown in (message(one), stream.ending(one)):
        (call,) = json.loads(JSONResponse(shown).body)["tool_calls"]
        assert call["function"]["arguments"] == source
        json.loads(source, parse_int=str, parse_constant=pytest.fail)


@pytest.mark.parametrize("call", CALLS)
def test_words_that_look_like_the_call_are_words(call: str) -> None:
    words = 'I search {it}, a search{"x": 1}, {"name": "search"} or research{}:'
    assert message(finished(words + call, ToolCall("search", {})))["content"] == words


def test_words_stand_directly_before_a_name_whose_mark_has_no_text() -> None:
    text = 'I will check.search{"q": 1}'
    one = Finished(text, "stop", 1, 0, SpecStats(), 0.0, tool_calls=(ToolCall("search", {"q": 1}),), words=text[:13])
    assert message(one)["content"] == "I will check."
    stream = Withheld()
    shown = stream.take(text[:7]) + stream.take(text[7:], calling=True)  # a step that has both words and mark
    assert shown + stream.ending(one)["content"] == "I will check."
