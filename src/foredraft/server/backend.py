"""A `Model` over an LLM and its Runner: the one place where the server touches engines.

Everything is called from the event loop's thread, but for the sinks, which the runner calls on its own.
"""

import asyncio
import gc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil

from foredraft.drafters.several import drafters_of
from foredraft.errors import RequestError
from foredraft.llm import LLM
from foredraft.results import Job
from foredraft.server.errors import ApiError
from foredraft.server.generation import Generation, Text
from foredraft.server.inbox import Bell, Mail
from foredraft.server.launching import taken
from foredraft.server.metrics import ModelMetrics
from foredraft.server.service import Answer, Ask, Figures, Finished, Messages, ModelInfo
from foredraft.server.settings import Limits
from foredraft.text import render_chat, token_bytes

FORMS = 64  # requests whose grammars may compile or wait for that; others are not held up by them
QUICK = 1000  # characters, or token ids
REMEMBERED = 0.8  # of the mean duration, from one request to the next


class EngineModel:
    """One loaded model that serves."""

    def __init__(self, llm: LLM, limits: Limits, metrics: ModelMetrics, loop: asyncio.AbstractEventLoop) -> None:
        llm.engine.keep_pace()
        self._llm = llm
        self._tokenizer = llm.tokenizer
        self._runner = llm.runner.start()
        self._limits = limits
        self._metrics = metrics
        self._loop = loop
        self._mail = Mail(loop, limits.stream_interval)
        self._forms = ThreadPoolExecutor(FORMS, thread_name_prefix="foredraft-forms")
        self._live: set[Generation] = set()
        self._empty = Bell(loop)
        self._texts = 0  # of all live generations
        self._preparing = 0  # requests that are not submitted yet
        self._open = True
        self._seconds = 1.0  # a request's mean duration
        self._bytes = token_bytes(llm.tokenizer)
        self._vocabulary = llm.model.vocab_size
        self.info = describe(llm)
        metrics.watch(self.figures)

    async def prepare(self, asks: Sequence[Ask]) -> list[Job]:
        self._preparing += 1
        try:
            if all(map(_is_quick, asks)):
                return _jobs(self._llm, asks)
            pool = self._forms if any(ask.params.structured is not None or ask.tools for ask in asks) else None
            return await self._loop.run_in_executor(pool, _jobs, self._llm, asks)
        finally:  # whoever waits in `drained` looks again only after the caller has submitted
            self._preparing -= 1
            self._ring_if_empty()

    def submit(self, prepared: Sequence[Job], *, stream: bool, details: bool) -> Answer:
        jobs = list(prepared)
        self._admit(len(jobs))
        how = (self.info.drafter, self._metrics, stream, details, self._mail)
        texts = [Text(index, job, *how) for index, job in enumerate(jobs)]
        generation = Generation(texts, self._mail, self._loop, self._runner.cancel)
        late = ApiError(
            504, f"not finished within this server's limit of {self._limits.request_timeout:g} s", code="timeout"
        )
        timer = self._loop.call_later(self._limits.request_timeout, generation.fail, late)
        generation.start(partial(self._ended, generation), timer)
        self._live.add(generation)
        self._mail.listen()
        self._texts += len(texts)
        for text in texts:
            self._runner.submit(text.job.request, partial(generation.take, text))
        return generation

    def _admit(self, count: int) -> None:
        """Raises ApiError where the queue has no room for so many more texts, or the model is being stopped."""
        if not self._open:
            raise _stopped()
        room = self.info.max_batch_size + self._limits.max_queue - self._texts
        if count <= room:
            return
        self._metrics.refused()
        waves = max(1.0, self._texts / self.info.max_batch_size)
        seconds = min(300, max(1, ceil(waves * self._seconds / 2)))
        message = f"the queue is full ({self._texts} texts, room for {max(0, room)} more); try again in {seconds} s"
        raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(seconds)})

    def _ended(self, generation: Generation) -> None:
        self._live.discard(generation)
        self._mail.leave()
        self._texts -= len(generation.texts)
        done = [one for one in generation.finished if isinstance(one, Finished) and one.stats.seconds_total]
        if done:
            mean = sum(one.stats.seconds_total for one in done) / len(done)
            self._seconds = REMEMBERED * self._seconds + (1 - REMEMBERED) * mean
        self._ring_if_empty()

    def _ring_if_empty(self) -> None:
        if not self._live and not self._preparing:
            self._empty.ring()

    def encode(self, prompt: str | Messages) -> list[int]:
        if isinstance(prompt, str):
            return [int(token) for token in self._tokenizer(prompt, verbose=False)["input_ids"]]
        return render_chat(self._tokenizer, prompt)

    def decode(self, ids: Sequence[int]) -> str:
        outside = next((token for token in ids if not 0 <= token < self._vocabulary), None)
        if outside is not None:
            raise RequestError(f"token id {outside} is outside the vocabulary of {self._vocabulary}")
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def token(self, token_id: int) -> tuple[str, list[int] | None]:
        text = self.decode([token_id])
        return text, None if self._bytes is None else list(self._bytes(token_id) or text.encode())

    def figures(self) -> Figures:
        scheduler = self._llm.engine.scheduler
        running = list(scheduler.running)
        room = self.info.max_batch_size * self.info.max_model_len
        return Figures(len(running), len(scheduler.waiting), sum(request.cached for request in running) / room)

    def stop_all(self) -> None:
        self._open = False
        for generation in list(self._live):
            generation.fail(_stopped())

    async def drained(self) -> None:
        while self._live or self._preparing:
            await self._empty.wait()

    def close(self) -> None:
        self._runner.stop()
        self._forms.shutdown(wait=False)
        self._metrics.forget()
        self._llm.model.cache.release()
        del self._llm, self._runner
        gc.collect()


def _jobs(llm: LLM, asks: Sequence[Ask]) -> list[Job]:
    return [_job(llm, ask) for ask in asks]


def _is_quick(ask: Ask) -> bool:
    """Whether to tokenise it takes less than to change threads for that."""
    if ask.tools or ask.params.structured is not None:
        return False
    texts = [ask.prompt] if ask.messages is None else [turn["content"] for turn in ask.messages]
    return sum(map(len, texts)) <= QUICK


def _job(llm: LLM, ask: Ask) -> Job:
    draft = ask.draft or "auto"  # JSON's null is "not given", Python's None is plain decoding
    if ask.messages is None:
        job = llm.job(ask.prompt, ask.params, ask.num_draft_tokens, draft=draft)
    else:
        choice = (ask.tools, ask.tool_choice, ask.template_arguments)
        several = ask.parallel_tool_calls
        job = llm.chat_job(
            ask.messages, ask.params, ask.num_draft_tokens, *choice, draft=draft, parallel_tool_calls=several
        )
    job.request.memory = ask.memory
    return job


def _stopped() -> ApiError:
    return ApiError(503, "the model is being stopped", code="stopped")


def describe(llm: LLM) -> ModelInfo:
    return ModelInfo(
        max_model_len=llm.max_model_len,
        max_batch_size=len(llm.engine.scheduler.free_slots),
        drafter=llm.drafter.name,
        drafters=tuple(it.name for it in drafters_of(llm.drafter)),
        chat=bool(llm.tokenizer.chat_template),
        dtype=str(llm.model.dtype).removeprefix("torch."),
        device=str(llm.model.device),
        exact=llm.model.row_invariance.exact,
        memory=llm.memory,
        bytes=taken(llm),
    )
