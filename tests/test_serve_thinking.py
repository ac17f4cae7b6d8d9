"""A model that thinks first, over HTTP: thoughts apart from the answer, which has its form; the same in a stream and
without drafting."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance.hf")

import httpx
from servers import PATIENCE, ServerProcess
from test_thinking import CLOSING, FIND, SCHEMA, thinking_tokenizer

from foredraft.llm import BUNDLED

jsonschema = pytest.importorskip("jsonschema")
FORM = {"type": "json_schema", "json_schema": {"name": "table", "schema": SCHEMA, "strict": True}}
CALL = {"tools": [{"type": "function", "function": FIND}], "tool_choice": "required", "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder: Path = tmp_path_factory.mktemp("thinking") / "target"
    shutil.copytree(BUNDLED / "target", folder)
    thinking_tokenizer().save_pretrained(folder)
    with ServerProcess("--model", str(folder), "--draft", "int4", "--uid", "thinker") as process:
        yield process


def body(**fields: Any) -> dict[str, Any]:
    return {
        "model": "thinker",
        "messages": [{"role": "user", "content": "A table in Oakland?"}],
        "chat_template_kwargs": {"enable_thinking": True},
        "max_tokens": 200,
        "temperature": 1,
        "seed": 1,
        "logit_bias": {str(CLOSING): 10},  # or it would think for long
        **fields,
    }


def answer(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body(**fields), timeout=PATIENCE)
    assert response.status_code == 200, response.text
    message: dict[str, Any] = response.json()["choices"][0]["message"]
    return message


def streamed(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    """The deltas of a stream, put together."""
    whole: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    asked = body(stream=True, **fields)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked, timeout=PATIENCE) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    for name, value in choice["delta"].items():
                        if name in whole and value:
                            whole[name] += value
    return whole


def test_an_answer_has_its_form_and_thoughts_are_apart(server: ServerProcess) -> None:
    message = answer(server, response_format=FORM)
    jsonschema.validate(json.loads(message["content"]), SCHEMA)
    assert message["reasoning_content"].strip()
    assert "think>" not in message["content"] + message["reasoning_content"]
    assert answer(server, response_format=FORM, num_draft_tokens=0) == message
    parts = streamed(server, response_format=FORM)
    assert (parts["content"], parts["reasoning_content"]) == (message["content"], message["reasoning_content"])


def test_a_call_after_thoughts(server: ServerProcess) -> None:
    message = answer(server, **CALL)
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "find" and message["reasoning_content"].strip()
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    plain = answer(server, **CALL, num_draft_tokens=0)
    assert plain["tool_calls"][0]["function"] == call["function"]
    parts = streamed(server, **CALL)
    assert parts["tool_calls"][0]["function"] == call["function"]
    assert parts["reasoning_content"] == message["reasoning_content"]
