"""JSON schemas and tool calls through a real server, by the official client."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
pytest.importorskip("openai")

import openai
from servers import ServerProcess
from test_tool_calls import FIND, MESSAGES, TEMPLATE

from foredraft import LLM, SamplingParams, Structured
from foredraft.llm import BUNDLED

NOW_TOOL = {"type": "function", "function": {"name": "now"}}
LARK = 'start: "a" NUMBER\nNUMBER: /[0-9]{2}/'
BOOKING = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "maximum": 9}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled target with a template that tells of tools."""
    made = Path(shutil.copytree(BUNDLED / "target", tmp_path_factory.mktemp("model") / "caller"))
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def marked(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose calls begin with special tokens, behind which the name is text: Mistral's newer way."""
    made = Path(shutil.copytree(folder, tmp_path_factory.mktemp("marked") / "marked"))
    file = made / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for mark, token in (("[TOOL_CALLS]", "\u0120Alamo"), ("[ARGS]", "\u0120BART")):
        number = vocabulary[mark] = vocabulary.pop(token)
        tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if "".join(pair) != token]
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": number, "content": mark})
    file.write_text(json.dumps(tokenizer))
    (made / "chat_template.jinja").write_text(
        "{{ tools | tojson }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
        "[TOOL_CALLS]{{ c.name }}[ARGS]{{ c.arguments }}{% endfor %}\n{% endfor %}assistant: "
    )
    return made


def test_the_name_behind_a_mark_is_not_streamed_as_words(marked: Path) -> None:
    with (
        ServerProcess("--model", str(marked), "--draft", str(BUNDLED / "draft"), "--uid", "caller") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        test_a_streamed_call_comes_whole(client)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    with (
        ServerProcess("--model", str(folder), "--draft", str(BUNDLED / "draft"), "--uid", "caller") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, "none")


def test_an_answer_of_a_schema(client: openai.OpenAI, llm: LLM) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "booking", "schema": BOOKING, "strict": True}}
    ask = {"model": "caller", "messages": MESSAGES, "temperature": 0.8, "seed": 2, "response_format": form}
    answer = client.chat.completions.create(**ask).choices[0]
    assert set(json.loads(answer.message.content)) == {"city", "people"}
    params = SamplingParams(temperature=0.8, seed=2, max_new_tokens=200, structured=BOOKING)
    assert answer.message.content == llm.chat(MESSAGES, params).text
    streamed = client.chat.completions.create(**ask, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == answer.message.content


def test_any_json_object(client: openai.OpenAI) -> None:
    ask = {"prompt": "A small object: ", "max_tokens": 60, "temperature": 0, "response_format": {"type": "json_object"}}
    text = client.post("/completions", body={"model": "caller", **ask}, cast_to=dict)["choices"][0]["text"]
    assert text.startswith("{")


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ({"json": BOOKING}, Structured.of_schema(BOOKING)),
        ({"json": json.dumps(BOOKING)}, Structured.of_schema(BOOKING)),
        ({"regex": "[a-c]{3}"}, Structured.regex("[a-c]{3}")),
        ({"choice": ["taxi", "train"]}, Structured.choice(["taxi", "train"])),
        ({"grammar": LARK}, Structured.grammar(LARK)),
    ],
)
def test_structured_outputs_are_the_librarys(client: openai.OpenAI, llm: LLM, asked: Any, form: Structured) -> None:
    ask = {"model": "caller", "temperature": 0.8, "seed": 2, "structured_outputs": asked}
    params = SamplingParams(temperature=0.8, seed=2, max_new_tokens=200, structured=form)
    body = {**ask, "messages": MESSAGES, "max_tokens": 200}
    answer = client.post("/chat/completions", body=body, cast_to=dict)["choices"][0]
    assert answer["message"]["content"] == llm.chat(MESSAGES, params).text and answer["finish_reason"] == "stop"
    body = {**ask, "prompt": "One: ", "max_tokens": 200}
    text = client.post("/completions", body=body, cast_to=dict)["choices"][0]["text"]
    assert text == llm.generate("One: ", params).text


@pytest.mark.parametrize("kind", ["json", "grammar"])
def test_a_form_does_not_tell_which_files_a_server_has(client: openai.OpenAI, folder: Path, kind: str) -> None:
    told = []
    for name in (folder / "config.json", folder / "nothing.json"):
        body = {"model": "caller", "prompt": "a", "max_tokens": 2, "structured_outputs": {kind: str(name)}}
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/completions", body=body, cast_to=dict)
        told.append(str(caught.value).replace(str(name), "").replace(name.name, ""))
    assert told[0] == told[1] and "file" not in told[0]


def test_a_form_beside_tools_is_refused_in_the_servers_words(client: openai.OpenAI) -> None:
    ask = {"model": "caller", "messages": MESSAGES, "max_tokens": 60, "temperature": 0}
    ask |= {"tools": [FIND], "response_format": {"type": "json_object"}}
    with pytest.raises(openai.BadRequestError, match="response_format or structured_outputs"):
        client.chat.completions.create(**ask)
    answer = client.chat.completions.create(**ask, tool_choice="none")
    assert (answer.choices[0].message.content or "").startswith("{")


def test_a_forced_call(client: openai.OpenAI, llm: LLM) -> None:
    ask = {"model": "caller", "messages": MESSAGES, "temperature": 0.9, "seed": 4, "tools": [FIND, NOW_TOOL]}
    ask["tool_choice"] = {"type": "function", "function": {"name": "find_restaurant"}}
    choice = client.chat.completions.create(**ask).choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.type) == ("tool_calls", None, "function")
    params = SamplingParams(temperature=0.9, seed=4, max_new_tokens=200)
    (alone,) = llm.chat(MESSAGES, params, tools=[FIND, NOW_TOOL], tool_choice="find_restaurant").tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (alone.name, alone.arguments)
    turns = [*MESSAGES, choice.message.model_dump(exclude_none=True)]
    turns.append({"role": "tool", "tool_call_id": call.id, "content": "three tables"})
    assert client.chat.completions.create(model="caller", messages=turns, max_tokens=5).choices[0].message.content


def test_a_streamed_call_comes_whole(client: openai.OpenAI) -> None:
    ask = {"model": "caller", "messages": MESSAGES, "temperature": 0.9, "seed": 4, "tools": [FIND, NOW_TOOL]}
    ask["tool_choice"] = "required"
    whole = client.chat.completions.create(**ask).choices[0].message.tool_calls
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
    assert "".join(choice.delta.content or "" for choice in chunks) == ""
    called = [call for choice in chunks for call in choice.delta.tool_calls or ()]
    assert [named(call) for call in called] == [named(call) for call in whole]
    assert chunks[-1].finish_reason == "tool_calls"


def test_a_tool_whose_calls_could_not_be_read_is_refused(client: openai.OpenAI) -> None:
    tools = [FIND, {"type": "function", "function": {"name": "f[ARGS]"}}]
    with pytest.raises(openai.BadRequestError, match=r"the tool name 'f\[ARGS\]' is not usable; give 1 to 64 letters"):
        client.chat.completions.create(model="caller", messages=MESSAGES, max_tokens=1, tools=tools)


def named(call: Any) -> tuple[str, str]:
    return call.function.name, call.function.arguments


def test_words_stay_words(client: openai.OpenAI) -> None:
    ask = {"model": "caller", "messages": MESSAGES, "temperature": 0.7, "seed": 1, "max_tokens": 30, "tools": [FIND]}
    whole = client.chat.completions.create(**ask).choices[0]
    streamed = client.chat.completions.create(**ask, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == whole.message.content and not whole.message.tool_calls
    unseen = client.chat.completions.create(**ask, tool_choice="none").choices[0]
    assert not unseen.message.tool_calls
