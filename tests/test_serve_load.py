"""Many clients at once: every answer is, byte for byte, the one that its request gets alone with plain decoding."""

import asyncio
import os
import random
from typing import Any

import pytest

pytest.importorskip("fastapi")

import httpx
from servers import PATIENCE, ServerProcess, until

from foredraft import LLM, SamplingParams

CLIENTS = int(os.environ.get("FOREDRAFT_TEST_CLIENTS", "64"))
OPENINGS = (
    "I need a taxi",
    "Book a table",
    "Find me a hotel",
    "A train to London",
    "What is there to see",
    "Thank you",
)


def requests() -> list[dict[str, Any]]:
    """Mixed lengths, temperatures, seeds, stops and draft lengths."""
    source = random.Random(1)
    made = []
    for number in range(CLIENTS):
        turns = source.randrange(1, 8)
        lines = [f"User: {source.choice(OPENINGS)} {source.randrange(100)}.\nAssistant:" for _ in range(turns)]
        made.append(
            {
                "prompt": "".join(lines),
                "max_tokens": source.choice((1, 7, 24, 60, 90)),
                "temperature": source.choice((0, 0, 0.7, 1.2)),
                "seed": source.randrange(2**62),
                "stop": source.choice(([], ["?"], ["User"])),
                "num_draft_tokens": source.choice((None, None, 0, 1, 5)),
                "stream": number % 2 == 0,
            }
        )
    return made


async def ask(client: httpx.AsyncClient, body: dict[str, Any], wait: float) -> str:
    await asyncio.sleep(wait)
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    if not body["stream"]:
        return str(answer.json()["choices"][0]["text"])
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: {")]
    return "".join(httpx.Response(200, text=event).json()["choices"][0]["text"] for event in events)


async def leave_early(client: httpx.AsyncClient, body: dict[str, Any], wait: float) -> None:
    """One of those who go away in the middle."""
    await asyncio.sleep(wait)
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 200}) as answer:
        async for _ in answer.aiter_lines():
            break


async def storm(url: str, bodies: list[dict[str, Any]]) -> list[str]:
    source = random.Random(2)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
        leaving = [leave_early(client, body, source.random() * 2) for body in bodies[::4]]
        asking = [ask(client, body, source.random() * 2) for body in bodies]
        answers = await asyncio.gather(*asking, *leaving)
    return [answer for answer in answers if answer is not None]


def alone(llm: LLM, body: dict[str, Any]) -> str:
    params = SamplingParams(
        temperature=body["temperature"], seed=body["seed"], max_new_tokens=body["max_tokens"], stop=tuple(body["stop"])
    )
    return llm.generate(body["prompt"], params, num_draft_tokens=0).text


def test_exact_under_load() -> None:
    bodies = requests()
    with ServerProcess("--max-queue", "1000") as server:
        served = asyncio.run(storm(server.url, bodies))
        until(server.idle)
    llm = LLM()
    assert served == [alone(llm, body) for body in bodies]
