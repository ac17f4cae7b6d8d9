"""A server under load: one stream against eight, drafting against plain, and what the web costs beside the library.

`python benchmarks/serve.py [--rounds N] [--out FILE]` starts a real `foredraft serve` on the bundled pair and asks it,
greedily, for 48 dialogue turns of 64 to 192 tokens, in turn by each arm:

one stream      streamed, one after the other
plain           the same eight at a time, "draft": "none"
drafting        the same eight at a time
library, plain  in this process, by eight threads that each ask for one turn after the other; no server in between
library         the same, drafting
all at once     the same in one call of `generate`, where no turn has to arrive

Server and clients share the machine, so that what the clients cost counts against the server: each is a connection
that asks for one turn after the other and parses nothing but the last event. `--gap` instead measures how long seven
plain streams wait while two prompts of 1,000 tokens arrive (the pair's context is 1,024). `--soak SECONDS` asks at
random for so long, with clients that leave, and prints the server's memory, threads and open files as it goes.
"""

import asyncio
import json
import os
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from _timing import interleave, paired_ratio, parser, report, summary
from demo import OPENINGS
from rich.console import Console
from rich.table import Table

from foredraft import LLM, SamplingParams
from foredraft.drafters.several import forget_outputs

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from servers import ServerProcess

TURNS, TOKENS, STREAMS, LONG = 48, 128, 8, 1000
COMPARED = (
    ("drafting", "one stream"),
    ("drafting", "plain"),
    ("library", "library, plain"),
    ("library", "all at once"),
    ("drafting", "library"),
    ("plain", "library, plain"),
)
SPARE = {"MiB": 8, "threads": 0, "files": 2}  # by which a process may differ that does not grow
LENGTHS = [TOKENS // 2 + i * 29 % TURNS * TOKENS // (TURNS - 1) for i in range(TURNS)]  # on average TOKENS
PROMPTS = [f"User: {OPENINGS[i % 8]} For {i} people.\nAssistant:" for i in range(TURNS)]


def main() -> int:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--gap", action="store_true")
    flags.add_argument("--soak", type=float, metavar="SECONDS")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    each_step = ("--stream-interval", "0", "--no-prefix-cache") if args.gap else ()
    environment = {"OMP_NUM_THREADS": str(args.threads)}
    with ServerProcess("--log-level", "error", *each_step, environment=environment) as server:
        if args.gap:
            return asyncio.run(gaps(server.url, args.rounds))
        if args.soak:
            return asyncio.run(soak(server, args.soak))
        llm = LLM(prefix_cache=False)
        forget_outputs(llm.drafter)  # every round asks the same
        arms = {
            "one stream": lambda: asyncio.run(served(server.url, 1)),
            "plain": lambda: asyncio.run(served(server.url, STREAMS, draft="none")),
            "drafting": lambda: asyncio.run(served(server.url, STREAMS)),
            "library, plain": lambda: by_threads(llm, 0),
            "library": lambda: by_threads(llm, None),
            "all at once": lambda: at_once(llm),
        }
        figures = interleave(arms, args.rounds)
    results: dict[str, Any] = {name: summary(values) for name, values in figures.items()}
    for name, other in COMPARED:
        results[f"{name} / {other}"] = paired_ratio(figures, name, other)
    show(results)
    if args.out:
        report("serve", results, args.out)
    return 0


async def served(url: str, streams: int, **extra: Any) -> float:
    """Tokens a second of all turns, `streams` clients asking for one after the other, each over one connection."""
    turns, began = iter(zip(PROMPTS, LENGTHS, strict=True)), perf_counter()

    async def client() -> int:
        count = 0
        reader, writer = await connected(url)
        for prompt, tokens in turns:
            ask(writer, body(prompt, tokens) | extra, close=False)
            count += used(await reader.readuntil(b"\r\n0\r\n\r\n"))
        writer.close()
        return count

    counts = await asyncio.gather(*(client() for _ in range(streams)))
    assert sum(counts) == sum(LENGTHS)
    return sum(counts) / (perf_counter() - began)


def body(prompt: str | list[int], tokens: int = TOKENS) -> dict[str, Any]:
    return {
        "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


async def streamed(url: str, asked: dict[str, Any]) -> int:
    """The tokens of one stream."""
    reader, writer = await send(url, asked)
    answer = await reader.read()
    writer.close()
    return used(answer)


def used(answer: bytes) -> int:
    """The tokens of a stream, as its last event tells."""
    last = next(line for line in reversed(answer.splitlines()) if line.startswith(b"data: {"))
    return int(json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"])


async def left(url: str, asked: dict[str, Any]) -> None:
    """A client that leaves at the first event."""
    reader, writer = await send(url, asked)
    await reader.readuntil(b"data: ")
    writer.close()


async def send(url: str, asked: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask over a connection of its own, which the server closes."""
    reader, writer = await connected(url)
    ask(writer, asked, close=True)
    return reader, writer


async def connected(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port), limit=2**20)


def ask(writer: asyncio.StreamWriter, asked: dict[str, Any], *, close: bool) -> None:
    content = json.dumps(asked).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "Connection: close\r\n" if close else ""
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)


PARAMS = [SamplingParams(max_new_tokens=tokens, ignore_eos=True) for tokens in LENGTHS]


def by_threads(llm: LLM, num_draft_tokens: int | None) -> float:
    """Tokens a second of all turns, each of `STREAMS` threads asking for one after the other."""

    def turn(prompt: str, params: SamplingParams) -> int:
        return len(llm.generate(prompt, params, num_draft_tokens=num_draft_tokens).token_ids)

    with ThreadPoolExecutor(STREAMS) as pool:
        began = perf_counter()
        return sum(pool.map(turn, PROMPTS, PARAMS)) / (perf_counter() - began)


def at_once(llm: LLM) -> float:
    began = perf_counter()
    return sum(len(result.token_ids) for result in llm.generate(PROMPTS, PARAMS)) / (perf_counter() - began)


async def gaps(url: str, rounds: int) -> int:
    """What running streams wait for at most, beside what they wait for in general."""
    table = Table("round", "a step, ms", "beside prompts", "longest", "in steps", "both prompts' first tokens after")
    for index in range(rounds + 1):
        step, beside, first = await gap(url)
        usual, most = statistics.median(beside), max(beside)
        if index:  # the first one warms up
            times = (
                f"{step:.2f}",
                f"{usual:.2f}",
                f"{most:.1f}",
                f"{usual / step:.1f}, {most / step:.1f}",
                f"{first:.0f}",
            )
            table.add_row(str(index), *times)
    Console().print(table)
    return 0


async def gap(url: str) -> tuple[float, list[float], float]:
    """In ms: the median time from one event of a stream to the next, all such times while long prompts are read, and
    how long that took."""
    seen: list[list[float]] = [[] for _ in range(STREAMS - 1)]
    plain = {"draft": "none"}
    streams = [asyncio.create_task(timed(url, body(PROMPTS[i], 600) | plain, seen[i])) for i in range(len(seen))]
    while not all(len(times) > 100 for times in seen):
        await asyncio.sleep(0.01)
    began, late = perf_counter(), [[], []]
    prompts = [[5 + (i * (number + 7)) % 3000 for i in range(LONG)] for number in range(len(late))]
    await asyncio.gather(*(timed(url, body(ids, 1) | plain, times) for ids, times in zip(prompts, late, strict=True)))
    ended = max(times[0] for times in late)
    assert not any(one.done() for one in streams), "the streams were over before the prompts had been read"
    steps = [b - a for times in seen for a, b in pairwise(times[20:100])]
    beside = [b - a for times in seen for a, b in pairwise(times) if b >= began and a <= ended]
    await asyncio.gather(*streams)
    return 1e3 * statistics.median(steps), [1e3 * gap for gap in beside], 1e3 * (ended - began)


async def timed(url: str, asked: dict[str, Any], times: list[float]) -> None:
    """Note when each event of a stream comes."""
    reader, writer = await send(url, asked)
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            times.append(perf_counter())
    writer.close()


def show(results: dict[str, Any]) -> None:
    table = Table("arm", "tokens a second")
    for name, found in results.items():
        table.add_row(name, f"{found['median']:.2f}" if " / " in name else f"{found['median']:.0f}")
    Console().print(table)


async def soak(server: ServerProcess, seconds: float) -> int:
    """Requests at random, a fourth of which are left in the middle; figures of the process ten times on the way.

    Fails where memory, threads or open files are more at the end than when a third of the time was over.
    """
    source, end = random.Random(0), time.monotonic() + seconds
    seen = [state(server)]
    while time.monotonic() < end:
        asked = [body(source.choice(PROMPTS), source.randrange(1, 200)) for _ in range(16)]
        await asyncio.gather(*((streamed if source.random() < 0.75 else left)(server.url, one) for one in asked))
        if time.monotonic() >= end - seconds * (1 - len(seen) / 10):
            seen.append(state(server))
            print(", ".join(f"{name} {value}" for name, value in seen[-1].items()), flush=True)
    grown = {name: seen[-1][name] - max(one[name] for one in seen[: len(seen) // 3 + 1]) for name in SPARE}
    print(f"grown since a third of the time: {grown}")
    return int(any(grown[name] > spare for name, spare in SPARE.items()))


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
