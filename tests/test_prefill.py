"""Long prompts beside running texts: nobody waits for another's prompt, and no bit depends on how it was cut."""

import asyncio
from dataclasses import dataclass
from random import Random

import pytest
from fakes import Ask, TableModel, new_request

from foredraft import LLM, SamplingParams
from foredraft.accounting import Pace
from foredraft.drafters.base import NoDrafter
from foredraft.engine import Engine
from foredraft.models.rows import PREFILL_CHUNK, RowInvariance
from foredraft.policy import Fixed
from foredraft.scheduler import LEAST, PIECE, PREFILL_BUDGET, SHORT
from foredraft.types import Request

VOCAB, LONG, STREAMS = 8, 2000, 3
ANYWHERE = RowInvariance(1, 1, 1, prefill=True)
NOWHERE = RowInvariance(min_rows=4, key_multiple=128)


@dataclass
class Steady:
    """A pace that was measured once and for all."""

    tokens: int

    def took(self, seconds: float, read: int) -> None: ...

    def budget(self, most: int) -> int:
        return self.tokens


def draws(count: int, seed: int) -> list[int]:
    source = Random(seed)
    return [source.randrange(VOCAB) for _ in range(count)]


def crowded(invariance: RowInvariance, budget: int | None = None) -> tuple[Engine, list[Request], TableModel]:
    """An engine in which some streams decode."""
    model = TableModel(VOCAB, max_positions=4096)
    model.row_invariance = invariance
    engine = Engine(model, NoDrafter(), Fixed(0), max_batch_size=8, max_model_len=4096)
    engine.keep_pace()
    if budget is not None:
        engine.pace = Steady(budget)  # type: ignore[assignment]
    streams = [new_request(Ask([1, 2, i], SamplingParams(max_new_tokens=2000), seed=i)) for i in range(STREAMS)]
    for request in streams:
        engine.add(request)
    engine.step()
    return engine, streams, model


@pytest.mark.parametrize("invariance", [ANYWHERE, NOWHERE], ids=["anywhere", "nowhere"])
@pytest.mark.parametrize("newcomers", [1, 4])
def test_every_stream_gets_a_token_in_every_step_beside_long_prompts(invariance, newcomers):
    engine, streams, model = crowded(invariance)
    late = [new_request(Ask(draws(LONG, i), SamplingParams(max_new_tokens=1))) for i in range(newcomers)]
    for request in late:
        engine.add(request)
    begun = len(model.passes)
    while any(not request.num_output for request in late):
        before = [request.num_output for request in streams]
        engine.step()
        assert [request.num_output for request in streams] == [count + 1 for count in before]
    assert max(model.passes[begun:]) <= PREFILL_BUDGET + 8 * invariance.min_rows


@pytest.mark.parametrize(("budget", "chunk"), [(1, LEAST), (42, 40), (103, 100), (10_000, PREFILL_CHUNK)])
def test_chunks_beside_streams_are_as_small_as_the_pace_says(budget, chunk):
    engine, _, model = crowded(ANYWHERE, budget)
    late = new_request(Ask(draws(LONG, 1), SamplingParams(max_new_tokens=2)))
    engine.add(late)
    begun = len(model.passes)
    while late.cached < LONG:
        reach = late.cached
        engine.step()
        assert reach < late.cached <= reach + chunk
        assert late.cached % PIECE == 0 or late.cached == LONG
        assert late.cached // PREFILL_CHUNK == reach // PREFILL_CHUNK or late.cached % PREFILL_CHUNK == 0
    assert max(model.passes[begun:]) == chunk + STREAMS


def test_short_prompts_are_read_at_once_and_the_rest_of_a_long_one_is_not():
    engine, _, _ = crowded(ANYWHERE, 1)
    short = new_request(Ask(draws(SHORT, 1), SamplingParams(max_new_tokens=2)))
    long = new_request(Ask(draws(SHORT + LEAST, 2), SamplingParams(max_new_tokens=2)))
    engine.add(short)
    engine.add(long)
    engine.step()
    assert (short.cached, long.cached) == (SHORT, 0)
    for steps in range(1, 2 + SHORT // LEAST):
        engine.step()
        assert long.cached == steps * LEAST


def test_a_short_prompt_is_not_begun_on_what_a_long_one_leaves():
    engine, _, _ = crowded(ANYWHERE, 1)
    long, short = (new_request(Ask(draws(n, n), SamplingParams(max_new_tokens=2))) for n in (5 * LEAST + 4, 30))
    engine.add(long)
    engine.add(short)
    while long.cached < len(long.token_ids) - long.num_output:
        engine.step()
        assert short.cached == 0
    engine.step()
    assert short.cached == 30


def test_chunks_are_whole_where_cuts_might_change_bits():
    engine, _, _ = crowded(NOWHERE, 40)
    late = new_request(Ask(draws(LONG, 1), SamplingParams(max_new_tokens=2)))
    engine.add(late)
    for chunk in range(LONG // PREFILL_CHUNK):
        engine.step()
        assert late.cached == (chunk + 1) * PREFILL_CHUNK


def test_chunks_are_whole_where_nobody_waits():
    engine, streams, _ = crowded(ANYWHERE, 40)
    for request in streams:
        engine.abort(request)
    late = new_request(Ask(draws(LONG, 1), SamplingParams(max_new_tokens=2)))
    engine.add(late)
    engine.step()
    assert late.cached == PREFILL_CHUNK


def test_a_library_that_nobody_watches_reads_whole_chunks():
    """There smaller ones would only make batches less dense."""
    engine, _, _ = crowded(ANYWHERE)
    engine.pace, engine.scheduler.cuts, engine.scheduler.budget_beside = None, False, PREFILL_BUDGET
    assert LLM().engine.pace is None
    late = [new_request(Ask(draws(200, i), SamplingParams(max_new_tokens=2))) for i in range(3)]
    for request in late:
        engine.add(request)
    engine.step()
    assert [request.cached for request in late] == [200, 200, 0]


@pytest.mark.parametrize("token", [0.001, 0.01, 0.03])
def test_a_step_with_a_prompt_takes_two_steps_time_at_most(token):
    """Steps of one second, to which each token of a prompt adds `token`."""
    pace = Pace()
    pace.took(300 * token, 300)
    for _ in range(20):
        pace.took(1.0, 0)
    for _ in range(20):
        read = max(LEAST, pace.budget(PREFILL_CHUNK) // PIECE * PIECE)
        assert 1 + token * read <= 2.01
        pace.took(1 + token * read, read)
    assert read > (1 / token) / 2 or read == PREFILL_CHUNK  # and it is used


def test_a_pace_forgets():
    pace = Pace()
    pace.took(1.0, 100)
    assert pace.budget(512) == 0  # no step without a prompt is known: the smallest piece
    for step in (1.0, 0.1):
        for _ in range(40):
            pace.took(step, 0)
        assert pace.budget(512) == pytest.approx(100 * step, abs=1)
    pace.took(50.0, 0)  # something else ran
    assert pace.budget(512) <= 13


def test_equal_prompts_that_come_together_are_computed_once():
    """Where chunks are smaller than a page too."""
    llm = LLM(draft="none", max_batch_size=4)
    llm.engine.keep_pace()
    assert llm.engine.scheduler.cuts
    llm.engine.pace = Steady(1)  # type: ignore[assignment]
    prompt = [5 + i % 90 for i in range(330)]
    busy = llm.job("User: I need a taxi.\nAssistant:", SamplingParams(max_new_tokens=400, ignore_eos=True), 0).request
    twins = [llm.job(prompt, SamplingParams(max_new_tokens=4, ignore_eos=True), 0).request for _ in range(2)]
    llm.engine.add(busy)
    llm.engine.step()
    for request in twins:
        llm.engine.add(request)
    while any(request.num_output < 4 for request in twins):
        llm.engine.step()
    assert twins[0].output_ids == twins[1].output_ids
    assert [request.stats.prefix_tokens for request in twins] == [0, 320]


def test_bits_are_the_same_however_prompts_are_cut():
    llm = LLM(prefix_cache=False, max_batch_size=4)
    prompt = [5 + (7 * i) % 900 for i in range(500)]
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=2)
    alone = llm.generate(prompt, params, num_draft_tokens=0)
    llm.engine.keep_pace()
    for budget in (1, 50, 200):
        llm.engine.pace = Steady(budget)  # type: ignore[assignment]
        asked = SamplingParams(max_new_tokens=300, ignore_eos=True)
        busy = llm.job("User: I need a taxi.\nAssistant:", asked).request
        llm.engine.add(busy)
        llm.engine.step()
        late = llm.job(prompt, params).request
        llm.engine.add(late)
        while late.num_output < 12:
            llm.engine.step()
        llm.engine.abort(busy)
        assert (late.output_ids, late.logprobs) == (alone.token_ids, alone.logprobs)


def test_a_served_model_keeps_pace():
    pytest.importorskip("fastapi")
    from foredraft.server.backend import EngineModel
    from foredraft.server.metrics import Metrics
    from foredraft.server.settings import Limits

    async def serve(llm: LLM) -> None:
        model = EngineModel(llm, Limits(), Metrics().of("x"), asyncio.get_running_loop())
        assert llm.engine.pace is not None and llm.engine.scheduler.cuts
        await asyncio.to_thread(model.close)

    asyncio.run(serve(LLM(draft="none")))
