"""Parts of the server by themselves: what is counted, and how often a stream speaks."""

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")

from foredraft import LLM, SamplingParams
from foredraft.server.backend import QUICK, EngineModel
from foredraft.server.errors import ApiError
from foredraft.server.inbox import Mail
from foredraft.server.metrics import Metrics, StepFigures
from foredraft.server.registry import Registry
from foredraft.server.service import Ask, Delta, Figures, Finished
from foredraft.server.settings import Limits
from foredraft.stats import SpecStats

PROMPT = "User: I need a taxi.\nAssistant:"


def shown(metrics: Metrics, name: str) -> dict[str, float]:
    """A metric's samples, by their labels but the model's."""
    text, _ = metrics.render()
    found = re.findall(rf"^foredraft:{name}{{([^}}]*)}} (\S+)$", text.decode(), re.MULTILINE)
    return {re.sub(r',?model_name="m",?', "", labels): float(value) for labels, value in found}


def test_steps_are_counted() -> None:
    metrics = Metrics()
    model = metrics.of("m")
    model.step(StepFigures(3, 4, 2, "suffix", "", None))
    model.step(StepFigures(2, 1, 1, "model", "", 0.005))
    model.step(StepFigures(1, 0, 0, "none", "policy", 100.0))
    one = {"spec_decode_num_drafts": 2, "spec_decode_num_draft_tokens": 5, "spec_decode_num_accepted_tokens": 3}
    for name, value in {**one, "generation_tokens": 6, "requests_refused": 0}.items():
        assert shown(metrics, f"{name}_total") == {"": value}
    drafted, accepted = (shown(metrics, f"spec_decode_num_{one}_tokens_per_pos_total") for one in ("draft", "accepted"))
    assert list(drafted.values()) == [2, 1, 1, 1] and list(accepted.values()) == [2, 1]
    assert list(drafted) == [f'position="{i}"' for i in range(4)]
    by_source = {f'source="{name}"': value for name, value in (("target", 3), ("suffix", 2), ("model", 1))}
    assert shown(metrics, "tokens_by_source_total") == by_source
    assert shown(metrics, "speculation_off_total") == {'reason="policy"': 1}


def test_buckets_hold_their_bounds() -> None:
    metrics = Metrics()
    model = metrics.of("m")
    model.step(StepFigures(2, 4, 1, "suffix", "", 0.005))  # 2.5 ms for each of two tokens, on a bound
    model.step(StepFigures(1, 40, 0, "suffix", "", 100.0))
    gaps = shown(metrics, "inter_token_latency_seconds_bucket")
    assert (gaps['le="0.001"'], gaps['le="0.0025"'], gaps['le="5.0"'], gaps['le="+Inf"']) == (0, 2, 2, 3)
    assert shown(metrics, "inter_token_latency_seconds_sum") == {"": 100.005}
    lengths = shown(metrics, "draft_length_tokens_bucket")
    assert (lengths['le="3.0"'], lengths['le="4.0"'], lengths['le="32.0"'], lengths['le="+Inf"']) == (0, 1, 1, 2)
    assert shown(metrics, "draft_length_tokens_count") == {"": 2}


def test_counters_outlive_their_model_and_gauges_do_not() -> None:
    metrics = Metrics()
    model = metrics.of("m")
    model.watch(lambda: Figures(2, 1, 0.5))
    model.finished("stop", SpecStats(prompt_tokens=7, output_tokens=3, seconds_total=1.0), 0.25)
    assert shown(metrics, "num_requests_running") == {"": 2} and shown(metrics, "kv_cache_usage_perc") == {"": 0.5}
    model.forget()
    assert shown(metrics, "num_requests_running") == {}
    metrics.of("m").finished("length", SpecStats(prompt_tokens=7), 0.0)  # launched again
    assert shown(metrics, "prompt_tokens_total") == {"": 14}
    ended = shown(metrics, "request_success_total")
    assert (ended['finished_reason="stop"'], ended['finished_reason="length"']) == (1, 1)
    assert shown(metrics, "request_queue_time_seconds_sum") == {"": 0.25}
    assert shown(metrics, "time_to_first_token_seconds_count") == {"": 0}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    yield LLM(draft="none", max_model_len=128, max_batch_size=2)


@pytest.mark.parametrize(
    ("interval", "logprobs", "details"), [(0, None, False), (9, None, False), (9, 0, False), (9, None, True)]
)
def test_a_stream_speaks_as_often_as_asked(llm: LLM, interval: float, logprobs: int | None, details: bool) -> None:
    """Tokens that wait for the next chunk are lost nowhere; whoever wants each step's drafts hears each step."""
    params = SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=logprobs)

    async def listen() -> tuple[list[Delta], Finished | None]:
        limits = Limits(stream_interval=interval)
        model = EngineModel(llm, limits, Metrics().of("m"), asyncio.get_running_loop())
        answer = model.submit(await model.prepare([Ask(params, PROMPT)]), stream=True, details=details)
        deltas = [delta async for some in answer.deltas() for delta in some]
        llm.runner.stop()
        return deltas, answer.finished[0]

    deltas, whole = asyncio.run(listen())
    assert whole is not None and "".join(delta.text for delta in deltas) == whole.text
    assert len(deltas) == (24 if interval == 0 or details else 2)
    assert deltas[0].text and [delta.finish_reason for delta in deltas[-2:]] == [None, "length"]
    assert sum(len(delta.logprobs) for delta in deltas) == len(whole.logprobs) == (24 if logprobs is not None else 0)
    assert sum(len(delta.tokens) for delta in deltas) == (24 if details else 0)


def test_short_prompts_are_prepared_at_once_and_long_ones_hold_nobody_up(llm: LLM) -> None:
    """A change of threads costs more than a short prompt; a long one would keep the streams waiting."""
    short, turns = Ask(SamplingParams(), "I need a taxi."), [{"role": "user", "content": "I need a taxi."}]
    forms = SamplingParams(structured={"type": "integer"}, max_new_tokens=4)
    quick = [short, replace(short, prompt=[5] * 20), Ask(SamplingParams(), messages=turns)]
    slow = [
        Ask(SamplingParams(max_new_tokens=1), "a " * QUICK),
        Ask(forms, "How many?"),
        replace(quick[2], tools=({},)),
    ]
    threads: set[int] = set()

    class Watching:
        def job(self, *_: object, **__: object) -> SimpleNamespace:
            threads.add(threading.get_ident())
            return SimpleNamespace(request=SimpleNamespace())

        chat_job = job

    async def prepare(asks: list[Ask]) -> bool:
        """Whether on the loop's own thread."""
        model = EngineModel(llm, Limits(), Metrics().of("m"), asyncio.get_running_loop())
        model._llm = Watching()  # type: ignore[assignment]
        threads.clear()
        await model.prepare(asks)
        llm.runner.stop()
        return threads == {threading.get_ident()}

    assert [asyncio.run(prepare([ask])) for ask in quick] == [True] * 3
    assert [asyncio.run(prepare([ask])) for ask in slow] == [False] * 3
    assert not asyncio.run(prepare([*quick, *slow[:1]]))


def test_the_loop_is_woken_for_what_is_urgent_and_hears_the_rest_on_the_beat() -> None:
    """Words of all streams come together; beats go on while somebody listens, and only then."""

    class Loop:
        """Counts how often it is woken; time is what the test says."""

        def __init__(self) -> None:
            self.soon: list[Callable[[], None]] = []
            self.later: list[tuple[Callable[[], None], SimpleNamespace]] = []

        def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
            self.soon.append(call)

        def call_later(self, seconds: float, call: Callable[[], None]) -> SimpleNamespace:
            handle = SimpleNamespace(cancel=lambda: self.later.clear())
            self.later.append((call, handle))
            return handle

    loop, heard = Loop(), []
    mail = Mail(loop, 1.0)  # type: ignore[arg-type]
    say = [partial(heard.append, name) for name in "abcdef"]
    mail.listen()
    mail.listen()
    mail.post(say[0], urgent=False)
    mail.post(say[1], urgent=False)
    assert (loop.soon, len(loop.later), mail.beat) == ([], 1, 0)
    loop.later.pop()[0]()
    assert (heard, mail.beat, len(loop.later)) == (["a", "b"], 1, 1)
    for number in (2, 3, 4):
        mail.post(say[number], urgent=number > 2)
    assert len(loop.soon) == 1  # two urgent ones, one call; what waited comes along, in order
    loop.soon.pop()()
    assert heard == ["a", "b", "c", "d", "e"]
    mail.leave()
    assert loop.later
    mail.leave()
    assert not loop.later
    always = Mail(loop, 0.0)  # type: ignore[arg-type]
    always.listen()
    always.post(say[5], urgent=False)
    assert len(loop.soon) == 1 and not loop.later


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("~0", 403),
        ("~nobody-of-that-name/x", 403),
        ("a" * 900, 400),
        ("/" + "a" * 900, 403),
        ("a\0b", 400),
        ("\\", 403),
    ],
)
def test_a_name_that_is_no_path_is_refused_like_any_other(name: str, status: int) -> None:
    """What a client calls a model may be anything; it is looked for on disk before anybody knows that."""
    with pytest.raises(ApiError) as caught:
        Registry((), (Path("/models"),), allow_hub=False).resolve(name)
    assert caught.value.status == status
