"""A real server on the bundled pair, by the clients that people use: openai, httpx, curl."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx
import openai
from servers import ServerProcess, until

from foredraft import LLM, SamplingParams

ASK = [{"role": "user", "content": "I would like to book a table for two."}]
PROMPT = "User: I want to find a restaurant.\nAssistant:"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


# --- the same text as in the library --------------------------------------------------------------------------------


def test_chat_is_the_librarys(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.chat.completions.create(model="bundled", messages=ASK, temperature=0)
    alone = llm.chat(ASK, SamplingParams(max_new_tokens=900), num_draft_tokens=0)
    assert answer.choices[0].message.content == alone.text
    assert answer.choices[0].finish_reason == alone.finish_reason == "stop"
    assert answer.usage.completion_tokens == len(alone.token_ids)
    assert answer.usage.prompt_tokens == len(alone.prompt_token_ids)


@pytest.mark.parametrize("seed", [0, 5])
def test_sampled_completion_is_the_librarys(client: openai.OpenAI, llm: LLM, seed: int) -> None:
    answer = client.completions.create(
        model="bundled", prompt=PROMPT, temperature=0.9, top_p=0.95, seed=seed, max_tokens=48
    )
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_new_tokens=48)
    assert answer.choices[0].text == llm.generate(PROMPT, params, num_draft_tokens=0).text


def test_stream_is_the_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="bundled", messages=ASK, temperature=0.8, seed=3, max_tokens=60)
    chunks = list(
        client.chat.completions.create(
            model="bundled", messages=ASK, temperature=0.8, seed=3, max_tokens=60, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_completion_stream(client: openai.OpenAI) -> None:
    ask = {"model": "bundled", "prompt": PROMPT, "temperature": 0, "max_tokens": 40}
    whole = client.completions.create(**ask)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True)]
    assert "".join(pieces) == whole.choices[0].text
    assert len(pieces) >= 2


def test_drafting_off_is_the_same(client: openai.OpenAI) -> None:
    ask = {"model": "bundled", "prompt": PROMPT, "temperature": 1, "seed": 11, "max_tokens": 64}
    texts, drafted = [], []
    for extra in ({}, {"num_draft_tokens": 0}, {"draft": "none"}, {"num_draft_tokens": 5}, {"draft": None, "gamma": 3}):
        answer = client.completions.create(**ask, extra_body=extra)
        texts.append(answer.choices[0].text)
        drafted.append(answer.usage.speculative_decoding["num_draft_tokens"] > 0)
    assert len(set(texts)) == 1
    assert drafted[1:] == [False, False, True, True]


@pytest.mark.parametrize("path", ["/completions", "/chat/completions"])
def test_each_drafter_by_name(client: openai.OpenAI, path: str) -> None:
    """Whoever guesses, the text is the same; and nobody guesses but who was asked to."""
    given = {"prompt": PROMPT} if path == "/completions" else {"messages": ASK}
    ask = {"model": "bundled", **given, "temperature": 1, "seed": 11, "max_tokens": 64, "return_draft_info": True}
    drafters = client.models.retrieve("bundled").drafters
    assert drafters == ["suffix", "model"]
    texts, guessed = [], {}
    for name in (*drafters, "auto", "none", "off"):
        choice = client.post(path, body={**ask, "draft": name}, cast_to=dict)["choices"][0]
        texts.append([(token["id"], token["text"]) for token in choice["draft_info"]["tokens"]])
        guessed[name] = {token["drafter"] for token in choice["draft_info"]["tokens"]} - {""}
    assert all(text == texts[0] for text in texts)
    assert guessed["model"] == {"model"} and guessed["suffix"] <= {"suffix"}
    assert guessed["none"] == guessed["off"] == set()
    deep = client.post(path, body={**ask, "draft": "model", "num_draft_tokens": 3}, cast_to=dict)
    assert len(deep["usage"]["speculative_decoding"]["num_draft_tokens_per_pos"]) == 3
    with pytest.raises(openai.BadRequestError, match="'suffix', 'model', or launch a model"):
        client.post(path, body={**ask, "draft": "int4"}, cast_to=dict)


def test_verifier_is_the_librarys(client: openai.OpenAI, llm: LLM) -> None:
    ask = {"model": "bundled", "prompt": PROMPT, "temperature": 1, "seed": 5, "max_tokens": 40}
    own = {"draft": "model", "num_draft_tokens": 4, "verifier": "rejection"}
    params = SamplingParams(temperature=1, seed=5, max_new_tokens=40, verifier="rejection")
    alone = llm.generate(PROMPT, params, num_draft_tokens=4, draft="model").text
    assert client.completions.create(**ask, extra_body=own).choices[0].text == alone
    assert client.completions.create(**ask).choices[0].text != alone


def test_async_client(server: ServerProcess) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            whole = await client.chat.completions.create(model="bundled", messages=ASK, temperature=0)
            stream = await client.chat.completions.create(model="bundled", messages=ASK, temperature=0, stream=True)
            return [whole.choices[0].message.content, "".join([c.choices[0].delta.content or "" async for c in stream])]

    whole, streamed = asyncio.run(ask())
    assert whole == streamed


# --- what a request may ask for -------------------------------------------------------------------------------------


def test_choices_use_seeds_that_follow(client: openai.OpenAI) -> None:
    ask = {"model": "bundled", "prompt": PROMPT, "temperature": 1, "max_tokens": 24}
    many = client.completions.create(**ask, n=3, seed=7)
    alone = [client.completions.create(**ask, seed=seed).choices[0].text for seed in (7, 8, 9)]
    assert [choice.text for choice in many.choices] == alone
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in client.completions.create(**ask, n=3, seed=7, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone


def test_several_prompts_text_and_ids(client: openai.OpenAI, llm: LLM) -> None:
    prompts = [PROMPT, "User: Hello.\nAssistant:"]
    ids = [llm.encode(prompt) for prompt in prompts]
    ask = {"model": "bundled", "temperature": 0, "max_tokens": 16}
    texts, tokens = (client.completions.create(**ask, prompt=given) for given in (prompts, ids))
    assert [choice.text for choice in texts.choices] == [choice.text for choice in tokens.choices]
    assert texts.usage.prompt_tokens == sum(map(len, ids))


def test_prompt_tokens_count_once_for_all_choices(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.completions.create(model="bundled", prompt=PROMPT, n=3, max_tokens=2)
    assert answer.usage.prompt_tokens == len(llm.encode(PROMPT))
    chat = client.chat.completions.create(model="bundled", messages=ASK, n=2, max_tokens=2)
    assert chat.usage.prompt_tokens == client.chat.completions.create(
        model="bundled", messages=ASK, max_tokens=2
    ).usage.prompt_tokens  # fmt: skip


def test_echo(client: openai.OpenAI) -> None:
    ask = {"model": "bundled", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    plain, echoed = client.completions.create(**ask), client.completions.create(**ask, echo=True)
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**ask, echo=True, stream=True))
    assert streamed == echoed.choices[0].text


def test_stop_strings(client: openai.OpenAI) -> None:
    free = client.completions.create(model="bundled", prompt=PROMPT, temperature=0, max_tokens=40).choices[0].text
    stop = free.split()[3]
    cut = client.completions.create(model="bundled", prompt=PROMPT, temperature=0, max_tokens=40, stop=stop)
    assert cut.choices[0].text == free[: free.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_logit_bias_bans(client: openai.OpenAI, llm: LLM) -> None:
    first = llm.generate(PROMPT, SamplingParams(max_new_tokens=1)).token_ids[0]
    answer = client.completions.create(
        model="bundled", prompt=PROMPT, temperature=0, max_tokens=1, logit_bias={str(first): -100}
    )
    params = SamplingParams(max_new_tokens=1, logit_bias={first: -100.0})
    assert answer.choices[0].text == llm.generate(PROMPT, params).text


def test_greedy_takes_filters(client: openai.OpenAI) -> None:
    """Many clients send top_p beside temperature 0; it can change nothing there."""
    ask = {"model": "bundled", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    assert (
        client.completions.create(**ask, top_p=0.5).choices[0].text == client.completions.create(**ask).choices[0].text
    )


def test_chat_logprobs(client: openai.OpenAI, llm: LLM) -> None:
    ask = {"model": "bundled", "messages": ASK, "temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(**ask)
    entries = answer.choices[0].logprobs.content
    alone = llm.chat(ASK, SamplingParams(max_new_tokens=12, logprobs=3))
    assert [entry.logprob for entry in entries] == [entry.logprob for entry in alone.logprobs]
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    assert entries[0].top_logprobs[0].token == entries[0].token  # greedy takes the likeliest
    assert all(bytes(entry.bytes).decode("utf-8", "replace") == entry.token for entry in entries)
    streamed = [
        entry.logprob
        for chunk in client.chat.completions.create(**ask, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == [entry.logprob for entry in entries]


def test_completion_logprobs(client: openai.OpenAI) -> None:
    ask = {"model": "bundled", "prompt": PROMPT, "temperature": 0, "max_tokens": 10, "logprobs": 2}
    answer = client.completions.create(**ask).choices[0].logprobs
    assert len(answer.tokens) == len(answer.token_logprobs) == len(answer.text_offset) == 10
    assert "".join(answer.tokens)[: answer.text_offset[4]] == "".join(answer.tokens[:4])
    assert all(len(top) == 2 for top in answer.top_logprobs)
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**ask, stream=True)]
    assert [offset for part in streamed if part for offset in part.text_offset] == answer.text_offset


def test_draft_info_tells_who_guessed(client: openai.OpenAI) -> None:
    ask = {"model": "bundled", "messages": ASK, "temperature": 0}
    ask["extra_body"] = {"return_draft_info": True, "num_draft_tokens": 4}
    answer = client.chat.completions.create(**ask)
    info = answer.choices[0].draft_info
    kinds = [token["kind"] for token in info["tokens"]]
    assert len(kinds) == answer.usage.completion_tokens
    assert kinds.count("accepted") == info["accepted"] == answer.usage.speculative_decoding["num_accepted_draft_tokens"]
    assert {token["drafter"] for token in info["tokens"]} == {"model", ""}
    assert "".join(token["text"] for token in info["tokens"]) == answer.choices[0].message.content
    steps = [c.choices[0] for c in client.chat.completions.create(**ask, stream=True)]
    streamed = [token for step in steps for token in (getattr(step, "draft_info", None) or {"tokens": []})["tokens"]]
    assert streamed == info["tokens"]
    assert sum(step.draft_info["drafted"] for step in steps if getattr(step, "draft_info", None)) == info["drafted"]


def test_harmless_fields(client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="bundled", messages=ASK, max_tokens=1, user="u", metadata={"a": "b"}, store=True, service_tier="auto",
        safety_identifier="x", prompt_cache_key="y", modalities=["text"], parallel_tool_calls=False,
    )  # fmt: skip


def test_text_parts(client: openai.OpenAI) -> None:
    ask = {"model": "bundled", "temperature": 0, "max_tokens": 12}
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "I would like to "}, {"type": "text", "text": "eat."}]}
    ]
    joined = [{"role": "user", "content": "I would like to eat."}]
    assert (
        client.chat.completions.create(messages=parts, **ask).choices[0].message.content
        == client.chat.completions.create(messages=joined, **ask).choices[0].message.content
    )


# --- refusals -------------------------------------------------------------------------------------------------------

BAD = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"top_p": 0}, "top_p"),
    ({"seed": -1}, "seed"),
    ({"stop": ["a"] * 99}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop.1"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, None),
    ({"logit_bias": {"5": 1e300}}, "logit_bias"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, None),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0.type",
    ),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages.0.mood"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"functions": [{}]}, "functions"),
    ({"stop_token_ids": [4096]}, None),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, None),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}, None),
    ({"num_draft_tokens": 10_000}, None),
    ({"num_draft_tokens": 3, "gamma": 4}, "gamma"),
    ({"draft": "none", "num_draft_tokens": 3}, "draft"),
    ({"draft": "/etc/passwd"}, "draft"),
    ({"verifier": "typical"}, "verifier"),
    ({"draft": "sufix"}, "draft"),
    ({"draft": "off", "gamma": 2}, "draft"),
    ({"processors": ["x"]}, "processors"),
    ({"guided_regex": "a+"}, "guided_regex"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"regx": "a"}}, "structured_outputs.regx"),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
    ({"structured_outputs": {"json": {"type": "nothing"}}}, None),
    ({"min_tokens": 3}, "min_tokens"),
    ({"frobnicate": 1}, "frobnicate"),
]


@pytest.mark.parametrize(("extra", "param"), BAD, ids=[json.dumps(extra)[:40] for extra, _ in BAD])
def test_refused_by_name(client: openai.OpenAI, extra: dict, param: str | None) -> None:
    """Nothing is ignored in silence: a 400 in OpenAI's shape that names the field."""
    body = {"model": "bundled", "messages": ASK, "max_tokens": 4, **extra}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    error = caught.value.body
    assert error["type"] == "invalid_request_error"
    assert next(iter(extra)).split(".")[0] in error["message"] or next(iter(extra)) in (
        "stop",
        "response_format",
        "structured_outputs",
    )
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", ""], [1, "a"], [True], {"a": 1}, None, [-1], [10**30]])
def test_prompts_that_are_none(server: ServerProcess, prompt: object) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": prompt, "max_tokens": 2})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and ("prompt" in message or "token id" in message)
    assert "constrained" not in message


def test_a_form_is_told_in_words(server: ServerProcess) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": 5}).json()["error"]
    assert answer["message"] == "prompt: it must be str or list[str] or list[int] or list[list[int]]; it was 5"
    assert answer["param"] == "prompt"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "the body is a list; send a JSON object"),
        ("x", 'the body is "x"; send a JSON object'),
        ({"prompt": ["a", 5]}, 'prompt: it must be str or list[str] or list[int] or list[list[int]]; it was ["a", 5]'),
        ({"prompt": "a", "seed": "7" * 99}, f'seed: it must be a whole number; it was "{"7" * 59}...'),
        ({"prompt": "a", "temperature": "hot"}, 'temperature: it must be a number; it was "hot"'),
        ({"prompt": "a", "stop": {"a": 1}}, "stop: it must be str or list[constrained-str]; it was an object"),
        ({"prompt": "a", "max_token": 3}, "max_token: there is no such field here, and none is ignored; did you mean "
         "'max_tokens'?"),
        ({"prompt": "a", "\ud800": 3}, "\\ud800: there is no such field here, and none is ignored; leave it out"),
        ({"prompt": "a", "structured_outputs": "a"}, "structured_outputs: it must be an object with json or regex or "
         'choice or grammar; it was "a"'),
        ({"prompt": "a", "structured_outputs": {"jsn": {}}}, "structured_outputs.jsn: there is no such field here, and "
         "none is ignored; did you mean 'json'?"),
        ({"prompt": "a", "stream_options": {"include_usge": True}}, "stream_options.include_usge: there is no such "
         "field here, and none is ignored; did you mean 'include_usage'?"),
        ({"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"shema": {}}}},
         "response_format.json_schema.shema: there is no such field here, and none is ignored; did you mean 'schema'?"),
        ({"prompt": "a", "response_format": {"type": "xml"}},
         "response_format.type: it must be 'text', 'json_object' or 'json_schema'; it was \"xml\""),
        ({"prompt": "a", "response_format": {}}, "response_format.type: it is missing; give it"),
        ({"prompt": "a", "stream_options": 5}, "stream_options: it must be an object with include_usage or "
         "include_obfuscation; it was 5"),
        ({"prompt": "a", "top_p": 2}, "top_p: it must be 1.0 or less; it was 2"),
        ({"prompt": "a", "seed": 1.5}, "seed: it must be a whole number; it was 1.5"),
        ({"prompt": "a", "logit_bias": [1, 2]}, "logit_bias: it must be an object; it was [1, 2]"),
        ({"prompt": "a", "stop_token_ids": {"1": 2}}, "stop_token_ids: it must be a list; it was an object"),
        ({"prompt": "a", "stream": "yes"}, 'stream: it must be true or false; it was "yes"'),
        ({"prompt": "a", "guided_choice": ["a"]}, "guided_choice is not supported: use structured_outputs={'choice': "
         "[...]}"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_value(server: ServerProcess, body: object, message: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=json.dumps(body), headers=headers)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)


def test_a_uid_that_is_none_is_told_in_words(server: ServerProcess) -> None:
    error = httpx.post(f"{server.url}/v1/models", json={"uid": "a b/c"}).json()["error"]
    form = "1 to 100 letters, digits, dots, dashes and underscores, the first a letter or a digit"
    assert error["message"] == f"uid: 'a b/c' is not usable; give {form}"


def test_a_tool_choice_without_tools_is_told_with_advice(server: ServerProcess) -> None:
    body = {"messages": ASK, "tool_choice": "required"}
    error = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["error"]
    assert error["message"] == "tool_choice='required' needs tools; give tools too, or leave it out"


def test_an_answer_may_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    ask = {"model": "bundled", "temperature": 0, "max_tokens": 8}
    said = client.chat.completions.create(messages=ASK, **ask).choices[0].message
    forms = (said, said.to_dict(), said.model_dump(), {"role": "assistant", "content": said.content})
    turns = [[*ASK, form, {"role": "user", "content": "And then?"}] for form in forms]
    texts = {client.chat.completions.create(messages=each, **ask).choices[0].message.content for each in turns}
    assert len(texts) == 1


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="bundled"):
        client.chat.completions.create(model="gpt-4", messages=ASK)


def test_model_may_be_left_out(server: ServerProcess) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 2})
    assert answer.status_code == 200 and answer.json()["model"] == "bundled"


def test_context_length(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="1024") as caught:
        client.completions.create(model="bundled", prompt="word " * 3000)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"null", b'{"prompt": NaN}', rb'{"prompt": "\ud800"}']
)
def test_bodies_that_are_none(server: ServerProcess, body: bytes) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_an_empty_body_is_told_in_words(server: ServerProcess) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", headers={"Content-Type": "application/json"}).json()["error"]
    assert answer["message"] == "the body is empty; send a JSON object"


def test_not_json_is_refused(server: ServerProcess) -> None:
    """So that a page of another site cannot send a request that needs no permission."""
    answer = httpx.post(
        f"{server.url}/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


def test_packed_bodies_are_refused(server: ServerProcess) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert httpx.post(f"{server.url}/v1/completions", content=b"{}", headers=headers).status_code == 415


def test_foreign_host_is_refused(server: ServerProcess) -> None:
    """DNS rebinding: a page of a site whose name was pointed at 127.0.0.1."""
    answer = httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"})
    assert answer.status_code == 421


def test_body_limit(server: ServerProcess) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x" * 5_000_000})
    assert answer.status_code == 413


def test_unknown_route_and_method(server: ServerProcess) -> None:
    missing = httpx.post(f"{server.url}/v1/embeddings", json={"input": "x"}).json()["error"]
    assert missing["type"] == "not_found_error"
    assert missing["message"] == "there is no POST /v1/embeddings here; GET /openapi.json lists what there is"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405


# --- other clients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/health", "/ready"])
def test_head_is_get_without_a_body(server: ServerProcess, path: str) -> None:
    """As `curl -I` and load balancers ask."""
    head, whole = (httpx.request(method, server.url + path) for method in ("HEAD", "GET"))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))
    assert httpx.head(server.url + "/v1/completions").status_code == 405


def test_httpx_reads_events(server: ServerProcess) -> None:
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0][6:])["object"] == "text_completion"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server: ServerProcess) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "temperature": 0})
    command = ["curl", "-sS", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    whole = json.loads(subprocess.check_output(command))
    streamed = subprocess.check_output([*command[:-1], body[:-1] + ', "stream": true}', "-N"], text=True)
    assert whole["usage"]["completion_tokens"] == 8
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in streamed.split("\n\n") if '"text"' in line]
    assert "".join(texts) == whole["choices"][0]["text"]


# --- beside generation ----------------------------------------------------------------------------------------------


def test_models_are_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "bundled" and model.object == "model" and model.state == "ready"
    assert client.models.retrieve("bundled").max_model_len == 1024
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_tokenize_and_back(server: ServerProcess, llm: LLM) -> None:
    answer = httpx.post(f"{server.url}/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert answer["tokens"] == llm.encode(PROMPT) and answer["count"] == len(answer["tokens"])
    assert "".join(answer["token_strs"]) == PROMPT
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back["prompt"] == PROMPT
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": ASK}).json()
    assert chat["count"] == len(llm.chat(ASK, SamplingParams(max_new_tokens=1)).prompt_token_ids)
    assert httpx.post(f"{server.url}/tokenize", json={}).status_code == 400
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [10**9]}).status_code == 400


def test_metrics_count_what_was_done(server: ServerProcess, client: openai.OpenAI) -> None:
    names = ("generation_tokens", "prompt_tokens", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")

    def counters() -> list[float]:
        return [server.metric(f"foredraft:{name}_total", model_name="bundled") for name in names]

    before = counters()
    answer = client.completions.create(model="bundled", prompt=PROMPT, temperature=0, max_tokens=40)
    spec = answer.usage.speculative_decoding
    expected = [40, answer.usage.prompt_tokens, spec["num_draft_tokens"], spec["num_accepted_draft_tokens"]]
    assert [after - one for after, one in zip(counters(), before, strict=True)] == expected
    per_position = server.metric("foredraft:spec_decode_num_accepted_tokens_per_pos_total")
    assert per_position == server.metric("foredraft:spec_decode_num_accepted_tokens_total")
    by_source = sum(server.metric("foredraft:tokens_by_source_total", source=name) for name in ("model", "suffix"))
    assert by_source == server.metric("foredraft:spec_decode_num_accepted_tokens_total")
    assert server.metric("foredraft:request_success_total", finished_reason="length") >= 1
    assert server.metric("foredraft:time_to_first_token_seconds_count") >= 1
    until(server.idle)


def test_speculation_off_says_why(server: ServerProcess, client: openai.OpenAI) -> None:
    before = server.metric("foredraft:speculation_off_total", reason="asked")
    client.completions.create(model="bundled", prompt=PROMPT, max_tokens=7, extra_body={"num_draft_tokens": 0})
    assert server.metric("foredraft:speculation_off_total", reason="asked") == before + 7


def test_log_has_ids_and_no_words(server: ServerProcess) -> None:
    secret = "xylophone quartz"
    answer = httpx.post(
        f"{server.url}/v1/completions", json={"prompt": secret, "max_tokens": 3}, headers={"X-Request-Id": "abc-1"}
    )
    assert answer.headers["x-request-id"] == "abc-1"
    until(lambda: any(event.get("request_id") == "abc-1" for event in server.events()))
    event = next(event for event in server.events() if event.get("request_id") == "abc-1")
    assert event["status"] == 200 and event["completion_tokens"] == 3 and event["model"] == "bundled"
    assert not any("xylophone" in line for line in server.lines)
    assert httpx.get(f"{server.url}/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


def test_openapi_knows_the_fields(server: ServerProcess) -> None:
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/models", "/metrics"} <= set(schema["paths"])
    fields = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"num_draft_tokens", "return_draft_info", "verifier", "top_k"} <= set(fields)


def test_the_dashboard_and_the_page_name_metrics_that_there_are(server: ServerProcess, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="bundled", messages=ASK, max_tokens=20)
    board = json.loads((Path(__file__).resolve().parents[1] / "deploy/grafana/foredraft.json").read_text())
    page = (Path(__file__).resolve().parents[1] / "docs/serve.md").read_text(encoding="utf-8")
    asked = {
        name for panel in board["panels"] for t in panel["targets"] for name in re.findall(r"foredraft:\w+", t["expr"])
    }
    shown = httpx.get(f"{server.url}/metrics").text
    assert len(asked) > 12
    asked |= set(re.findall(r"foredraft:\w+", page))
    assert [name for name in sorted(asked) if f"\n{name}" not in shown and f"TYPE {name} " not in shown] == []


def test_a_part_that_is_no_text_is_told_by_its_type(server: ServerProcess) -> None:
    part = {"type": "image_url", "image_url": {"url": "a"}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    error = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["error"]
    said = "it must be 'text', the only kind that is read; it was 'image_url'"
    assert (error["param"], error["message"]) == ("messages.0.content.0.type", f"messages.0.content.0.type: {said}")
