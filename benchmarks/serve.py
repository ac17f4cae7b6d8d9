"""A server under load: one stream against eight, drafting against plain, and what the web costs beside the library.

`python benchmarks/serve.py [--rounds N] [--out FILE]` starts a real `foredraft serve` on the bundled pair and asks it,
greedily, for 24 dialogue turns of 128 tokens, in turn by each arm:

one stream      streamed, one after the other
plain           the same eight at a time, "draft": "none"
drafting        the same eight at a time
library         in this process, batches of eight, as `generate` takes them; no server in between

Server and clients share the machine, so that what the clients cost counts against the server. `--soak SECONDS` instead
asks at random for so long, with clients that leave, and prints the server's memory, threads and open files as it goes.
"""

import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from _timing import interleave, paired_ratio, parser, report, summary
from demo import OPENINGS
from rich.console import Console
from rich.table import Table

from foredraft import LLM, SamplingParams
from foredraft.drafters.several import forget_outputs

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from servers import ServerProcess

TURNS, TOKENS, STREAMS = 24, 128, 8
PROMPTS = [f"User: {OPENINGS[i % 8]} For {i} people.\nAssistant:" for i in range(TURNS)]


def main() -> int:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--soak", type=float, metavar="SECONDS")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    with ServerProcess("--log-level", "error", environment={"OMP_NUM_THREADS": str(args.threads)}) as server:
        if args.soak:
            return asyncio.run(soak(server, args.soak))
        llm = LLM()
        forget_outputs(llm.drafter)  # every round asks the same
        arms = {
            "one stream": lambda: asyncio.run(served(server.url, 1)),
            "plain": lambda: asyncio.run(served(server.url, STREAMS, draft="none")),
            "drafting": lambda: asyncio.run(served(server.url, STREAMS)),
            "library": lambda: alone(llm),
        }
        figures = interleave(arms, args.rounds)
    results: dict[str, Any] = {name: summary(values) for name, values in figures.items()}
    for name, other in (("drafting", "one stream"), ("drafting", "plain"), ("drafting", "library")):
        results[f"{name} / {other}"] = paired_ratio(figures, name, other)
    show(results)
    if args.out:
        report("serve", results, args.out)
    return 0


async def served(url: str, streams: int, **extra: Any) -> float:
    """Tokens a second of all turns, `streams` of them at once."""
    gate, began = asyncio.Semaphore(streams), time.perf_counter()
    async with connected(url) as client:

        async def turn(prompt: str) -> int:
            async with gate:
                return await streamed(client, body(prompt) | extra)

        counts = await asyncio.gather(*map(turn, PROMPTS))
    assert sum(counts) == TURNS * TOKENS
    return sum(counts) / (time.perf_counter() - began)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        yield client


def body(prompt: str, tokens: int = TOKENS) -> dict[str, Any]:
    return {
        "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


async def streamed(client: httpx.AsyncClient, asked: dict[str, Any]) -> int:
    """The tokens of one stream, as its usage tells; nothing is parsed but the last event."""
    last = ""
    async with client.stream("POST", "/v1/completions", json=asked) as answer:
        async for line in answer.aiter_lines():
            last = line if line.startswith("data: {") else last
    return int(httpx.Response(200, text=last.removeprefix("data: ")).json()["usage"]["completion_tokens"])


def alone(llm: LLM) -> float:
    params = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
    began = time.perf_counter()
    count = sum(len(result.token_ids) for result in llm.generate(PROMPTS, params))
    return count / (time.perf_counter() - began)


def show(results: dict[str, Any]) -> None:
    table = Table("arm", "tokens a second")
    for name, found in results.items():
        table.add_row(name, f"{found['median']:.2f}" if " / " in name else f"{found['median']:.0f}")
    Console().print(table)


async def soak(server: ServerProcess, seconds: float) -> int:
    """Requests at random, a fourth of which are left in the middle; figures of the process ten times on the way."""
    source, end = random.Random(0), time.monotonic() + seconds
    shown = time.monotonic()
    first = None
    async with connected(server.url) as client:
        while time.monotonic() < end:
            asked = [body(source.choice(PROMPTS), source.randrange(1, 200)) for _ in range(16)]
            await asyncio.gather(
                *(streamed(client, one) if source.random() < 0.75 else left(client, one) for one in asked)
            )
            if time.monotonic() >= shown:
                shown += seconds / 10
                now = state(server)
                first = first or now
                print(", ".join(f"{name} {value}" for name, value in now.items()), flush=True)
    last = state(server)
    grown = last["MiB"] - first["MiB"] if first else 0
    print(f"grown by {grown} MiB after the first figures")
    return 0 if first and last["threads"] <= first["threads"] + 1 and last["files"] <= first["files"] + 2 else 1


async def left(client: httpx.AsyncClient, asked: dict[str, Any]) -> None:
    async with client.stream("POST", "/v1/completions", json=asked) as answer:
        async for _ in answer.aiter_lines():
            return


def state(server: ServerProcess) -> dict[str, int]:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "MiB": int(lines["VmRSS"].split()[0]) // 1024,
        "threads": int(lines["Threads"]),
        "files": len(os.listdir(f"/proc/{server.process.pid}/fd")),
    }


if __name__ == "__main__":
    sys.exit(main())
