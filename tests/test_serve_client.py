"""Programs that launch, list, use and end models of a running server: our client, Xinference's, the command line."""

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")

import httpx
from fake_model import FakeModel
from servers import PATIENCE, ServerProcess
from starlette.testclient import TestClient
from typer.testing import CliRunner

from foredraft import LLM, SamplingParams
from foredraft.cli.app import app
from foredraft.cli.launch import show
from foredraft.cli.remote import open_remote
from foredraft.client import Client
from foredraft.errors import RequestError, ServerError
from foredraft.server import middleware
from foredraft.server.app import create_app
from foredraft.server.backend import EngineModel
from foredraft.server.errors import ApiError
from foredraft.server.metrics import Metrics
from foredraft.server.models import Loader
from foredraft.server.service import Ask, Finished
from foredraft.server.settings import Limits, Settings

PROMPT = "User: I need a taxi.\nAssistant:"
GREEDY = {"temperature": 0, "max_tokens": 24}
PAIR = ("foredraft-bundled", 0.01, None, "foredraft-bundled", 0.001, None)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as process:
        yield process


@pytest.fixture(scope="module")
def plain() -> Any:
    """What the library writes, without drafts."""
    llm = LLM(draft="none")
    params = SamplingParams(max_new_tokens=24)
    return llm.generate(PROMPT, params).text, llm.chat([{"role": "user", "content": "I need a taxi."}], params).text


def test_our_client(server: ServerProcess, plain: tuple[str, str]) -> None:
    with Client(server.url) as client:
        uid = client.launch_speculative_llm(*PAIR)
        assert client.list_models()[uid]["state"] == "ready"
        known = client.call("GET", "/v1/model_registrations/LLM")
        assert {"model_name": "foredraft-bundled", "is_builtin": True, "sizes_in_billions": [0.01, 0.001]} in known
        model = client.get_model(uid)
        whole = model.generate(PROMPT, GREEDY)
        streamed = model.generate(PROMPT, {**GREEDY, "stream": True})
        assert whole["choices"][0]["text"] == "".join(c["choices"][0]["text"] for c in streamed) == plain[0]
        answer = model.chat("I need a taxi.", generate_config={**GREEDY, "gamma": 4})
        assert answer["choices"][0]["message"]["content"] == plain[1]
        assert answer["usage"]["speculative_decoding"]["num_accepted_draft_tokens"] > 0
        client.terminate_model(uid)
        assert uid not in client.list_models()
        with pytest.raises(ServerError, match=uid):
            client.get_model(uid)


def test_our_client_tells_errors(server: ServerProcess) -> None:
    with Client(server.url) as client, pytest.raises(ServerError, match="no size 7"):
        client.launch_speculative_llm("foredraft-bundled", 7, None, "foredraft-bundled", 0.001, None)
    with Client("http://127.0.0.1:9") as client, pytest.raises(ServerError, match="does not answer"):
        client.list_models()


def test_xinferences_client(server: ServerProcess, plain: tuple[str, str]) -> None:
    """The last releases that knew speculative models: 0.9 and before."""
    xinference = pytest.importorskip("xinference_client")
    client = xinference.RESTfulClient(server.url)
    with pytest.warns(UserWarning, match="experimental"):
        uid = client.launch_speculative_llm(*PAIR)
    assert uid in client.list_models()
    model = client.get_model(uid)
    assert model.generate(PROMPT, GREEDY)["choices"][0]["text"] == plain[0]
    streamed = model.generate(PROMPT, {**GREEDY, "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == plain[0]
    answer = model.chat("I need a taxi.", chat_history=[], generate_config=GREEDY)
    assert "foredraft-bundled" in {model["model_name"] for model in client.list_model_registrations("LLM")}
    assert answer["choices"][0]["message"]["content"] == plain[1]
    client.terminate_model(uid)
    assert uid not in client.list_models()


def test_xinferences_client_asks_whether_keys_are_needed_before_it_has_one() -> None:
    keyed = create_app(Settings(keys=("a-key-of-some-length",)), lambda *_: Loader(lambda spec: 0, lambda *_: None))
    with TestClient(keyed, base_url="http://localhost") as client:
        assert client.get("/v1/cluster/auth").json() == {"auth": True}
        assert client.get("/v1/models").status_code == 401


def run(*args: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, args, input=stdin, prog_name="foredraft")


def test_command_line(server: ServerProcess, plain: tuple[str, str]) -> None:
    where = ("--server", server.url)
    launched = run("launch", "foredraft-bundled", "--size", "0.01", "--draft", "ngram", "--uid", "small", *where)
    assert launched.exit_code == 0 and launched.stdout.split() == ["small"]
    assert json.loads(run("list", "--json", *where).stdout)["small"]["draft"] == "ngram"
    shown = run("list", *where).stdout.splitlines()
    assert shown[0].split() == ["uid", "state", "context", "batch", "dtype", "device", "memory"]
    assert [line.split()[:4] for line in shown[1::2]] == [
        ["bundled", "ready", "1024", "8"],
        ["small", "ready", "1024", "8"],
    ]
    assert shown[2::2] == ["    bundled, draft: suffix, model", "    foredraft-bundled, draft: ngram"]
    said = run("chat", "--model", "small", "--max-new-tokens", "24", *where, stdin="I need a taxi.\n/exit\n")
    assert said.exit_code == 0 and plain[1].strip() in said.stdout
    assert run("terminate", "small", *where).exit_code == 0
    assert "small" not in json.loads(run("list", "--json", *where).stdout)


def test_a_list_of_models_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    ready = {"id": "foredraft-bundled-52979d", "model_name": "foredraft-bundled", "state": "ready", "error": None}
    ready |= {"max_model_len": 131072, "max_batch_size": 256, "dtype": "bfloat16", "device": "cuda:0"}
    ready |= {"memory": {"a": 2**37}, "progress": {"bytes": 0}, "draft": "suffix, int4+skip"}
    empty = dict.fromkeys(("max_model_len", "max_batch_size", "dtype", "device", "memory", "draft"))
    failed = (
        ready | empty | {"id": "nope", "state": "failed", "model_name": "/models/\x1b[31mnope", "error": "no model"}
    )
    show([ready, failed])
    heads, first, about, second, why = capsys.readouterr().out.splitlines()
    assert max(map(len, (heads, first, second))) <= 80
    assert first.split() == [
        "foredraft-bundled-52979d",
        "ready",
        "131072",
        "256",
        "bfloat16",
        "cuda:0",
        "131,072",
        "MiB",
    ]
    assert about == "    foredraft-bundled, draft: suffix, int4+skip"
    assert second.split() == ["nope", "failed", "-", "-", "-", "-", "0", "MiB"]
    assert why == "    /models/\ufffd[31mnope, failed: no model"


def test_the_only_usable_model_is_talked_to() -> None:
    def models(**states: str) -> Any:
        described = {"draft": None, "model_ability": ["chat"]}
        return SimpleNamespace(list_models=lambda: {uid: {**described, "state": it} for uid, it in states.items()})

    assert open_remote(models(one="ready", other="failed", third="draining"), None).uid == "one"
    with pytest.raises(RequestError, match="has one, two; name one"):
        open_remote(models(one="ready", other="failed", two="ready"), None)


def test_a_model_without_a_template_is_no_chat() -> None:
    model = FakeModel()
    model.info = replace(model.info, chat=False)
    bare = create_app(Settings(), lambda *_: Loader(lambda spec: 0, lambda *_: model))
    messages = [{"role": "user", "content": "x"}]
    with TestClient(bare, base_url="http://localhost") as client:
        client.post("/v1/models", json={"uid": "bare", "wait": True})
        for path in ("/v1/chat/completions", "/tokenize"):
            error = client.post(path, json={"messages": messages}).json()["error"]
            assert error["message"].startswith(
                "the model 'bare' has no chat template; send the text itself as 'prompt'"
            )
            assert "/v1/completions" in error["message"] and error["param"] == "messages"
        assert client.post("/tokenize", json={"prompt": "x"}).status_code == 200


def test_chat_over_a_server_ignores_no_flag(server: ServerProcess, tmp_path: Path) -> None:
    where = ("--server", server.url, "--model", "bundled", "--max-new-tokens", "40")
    for flag in (("--runtime", "torch"), ("--weight-format", "int8"), ("--draft", "ngram"), ("--regex", "a+")):
        refused = run("chat", *where, *flag, stdin="hello\n")
        assert isinstance(refused.exception, RequestError) or refused.exit_code == 2, flag
        assert flag[0] in str(refused.exception) + refused.stderr
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["taxi", "train"]}')
    said = run("chat", *where, "--json-schema", str(schema), stdin="I need a taxi.\n/exit\n")
    assert json.loads(said.stdout) in ("taxi", "train")


@pytest.fixture
def slow_llm(monkeypatch: pytest.MonkeyPatch) -> "tuple[LLM, threading.Event, threading.Event]":
    """A model on which preparing a request begins, tells so, and goes on when it is let."""
    begun, go, job = threading.Event(), threading.Event(), LLM.job

    def slow(*args: Any, **named: Any) -> Any:
        begun.set()
        assert go.wait(PATIENCE)
        return job(*args, **named)

    monkeypatch.setattr(LLM, "job", slow)
    monkeypatch.setattr("foredraft.server.backend.QUICK", 0)  # on a thread of its own
    return LLM(draft="none", max_model_len=64, max_batch_size=1), begun, go


@pytest.mark.parametrize("in_time", [True, False])
def test_a_model_is_not_freed_under_a_request_in_preparation(slow_llm: Any, in_time: bool) -> None:
    llm, begun, go = slow_llm

    async def answer(model: EngineModel) -> list[Finished]:
        prepared = await model.prepare([Ask(SamplingParams(max_new_tokens=4), PROMPT)])
        return await model.submit(prepared, stream=False, details=False).wait()

    async def scene() -> None:
        model = EngineModel(llm, Limits(), Metrics().of("x"), asyncio.get_running_loop())
        answering = asyncio.create_task(answer(model))
        await asyncio.to_thread(begun.wait, PATIENCE)
        draining = asyncio.create_task(model.drained())
        await asyncio.sleep(0)
        assert not draining.done()
        if not in_time:
            model.stop_all()
        go.set()
        if in_time:
            assert len((await answering)[0].text) > 0
        else:
            with pytest.raises(ApiError, match="being stopped"):
                await answering
        await draining
        model.close()
        assert model.encode(PROMPT)  # a tokenizer outlives the weights

    asyncio.run(scene())


def test_a_launch_that_takes_long_is_no_error_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(middleware, "STUCK", 0.0)

    def load(*_: object) -> Any:
        go.wait(PATIENCE)
        raise RequestError("never mind")

    late = create_app(Settings(Limits(request_timeout=0.05)), lambda *_: Loader(lambda spec: 0, load))
    with TestClient(late, base_url="http://localhost") as client:
        response: httpx.Response = client.post("/v1/models", json={"uid": "slow", "wait": True})
        assert response.status_code == 504
        assert "GET /v1/models tells" in response.json()["error"]["message"]
        assert client.get("/v1/models/slow").json()["state"] == "loading"
        go.set()
