"""The texts of one request in an engine: what its steps gave them, on its thread, and who waits for them on the loop.

Knows jobs and step outputs, nothing of the web.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

from foredraft.results import GenerationResult, Job
from foredraft.server.inbox import Bell, Mail
from foredraft.server.metrics import ModelMetrics, StepFigures
from foredraft.server.service import Delta, Finished, TokenKind, TokenPiece
from foredraft.structured.thinking import Parting
from foredraft.types import Request, StepOutput, TokenLogprobs

ALIVE_EVERY = 15.0  # seconds without a step after which a stream gives a sign of life


@dataclass(slots=True)
class Text:
    """One text while it grows. Everything here happens on the engine's thread, until it has ended."""

    index: int
    job: Job
    drafter: str
    metrics: ModelMetrics
    stream: bool
    details: bool
    mail: Mail  # on each of its beats there is a delta; with `details` each step has its own
    tokens: list[TokenPiece] = field(default_factory=list)
    kinds: list[TokenKind] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    scored: int = 0
    last_step: float | None = None
    spoken: int = -1  # the beat of the last delta
    queued: float = 0.0
    parting: Parting | None = None  # of a stream of a chat whose model may think
    calling: bool = False  # whether a tool call has been opened

    def __post_init__(self) -> None:
        thinking = self.job.thinking
        if thinking is not None and thinking.written:
            self.parting = Parting(thinking.phase)

    def take(self, output: StepOutput) -> Delta | None:
        """Count a step, and make of it what a stream shows; None where that can wait for the next one."""
        if output.finish_reason in ("abort", "error"):  # nobody reads on; nothing here may fail any more
            return Delta(self.index, "", finish_reason=output.finish_reason)
        stats = self.job.request.stats
        drafted, accepted = stats.drafted - self.drafted, stats.accepted - self.accepted
        self.drafted, self.accepted = stats.drafted, stats.accepted
        self.calling = self.calling or self.job.call_mark in output.token_ids
        now = perf_counter()
        self._measure(output, drafted, accepted, now)
        if self.details:
            text, pieces = self._pieces(output, drafted, accepted)
            thought, text = self._part(text, output)
            new = self._new_logprobs()
            return Delta(self.index, text, pieces, new, drafted, accepted, output.finish_reason, thought, self.calling)
        if output.finish_reason is None and not (self.stream and self._may_speak()):
            return None
        self.spoken = self.mail.beat
        thought, text = self._part(self._text(output), output)
        new = self._new_logprobs()
        return Delta(
            self.index, text, (), new, finish_reason=output.finish_reason, reasoning=thought, calling=self.calling
        )

    def _part(self, text: str, output: StepOutput) -> tuple[str, str]:
        """What of it is thought, and what is answer."""
        return ("", text) if self.parting is None else self.parting.take(text, last=output.finish_reason is not None)

    def _may_speak(self) -> bool:
        return self.mail.beat > self.spoken or not self.mail.interval

    def _measure(self, output: StepOutput, drafted: int, accepted: int, now: float) -> None:
        since = None if self.last_step is None else now - self.last_step
        off = "" if drafted else self._why_off()
        if self.last_step is None:
            self.queued = max(0.0, self.job.request.started - self.job.request.arrived)
        self.last_step = now
        if output.token_ids:
            self.metrics.step(StepFigures(len(output.token_ids), drafted, accepted, output.source, off, since))

    def _why_off(self) -> str:
        if self.job.request.num_draft_tokens == 0:
            return "asked"
        if self.drafter == "none":
            return "no_drafter"
        return "first_token" if self.last_step is None else "policy"

    def _text(self, output: StepOutput) -> str:
        """What is settled and was not shown yet."""
        stream = self.job.stream
        if stream is None or not self.stream:
            return ""
        if output.finish_reason:
            stream.close()
        return stream.take()

    def _pieces(self, output: StepOutput, drafted: int, accepted: int) -> tuple[str, tuple[TokenPiece, ...]]:
        """The text that is settled now, and this step's tokens; text that waited comes with the token that owns it."""
        self.kinds += _kinds(output.from_draft, drafted, accepted)
        self.sources += [output.source if flag else "" for flag in output.from_draft]
        stream = self.job.stream
        if stream is None:
            return "", ()
        if output.finish_reason:
            stream.close()
        first = len(self.kinds) - len(output.token_ids)
        texts = dict.fromkeys(range(first, len(self.kinds)), "")
        whole = []
        for piece, owner in stream.take_pieces(range(len(self.kinds))):  # type: ignore[arg-type]  # numbers as flags
            whole.append(piece)
            texts[int(owner)] = texts.get(int(owner), "") + piece
        ids = self.job.request.output_ids
        named = tuple(TokenPiece(ids[i], text, self.kinds[i], self.sources[i]) for i, text in sorted(texts.items()))
        if not self.stream:
            self.tokens += named
        return "".join(whole), named

    def _new_logprobs(self) -> tuple[TokenLogprobs, ...]:
        entries = self.job.request.logprobs
        new = tuple(entries[self.scored :]) if self.stream else ()
        self.scored = len(entries)
        return new

    def end(self) -> Finished:
        result = self.job.result()
        self.metrics.finished(result.finish_reason, result.stats, self.queued)
        return Finished(
            result.answer,
            result.finish_reason,
            len(result.prompt_token_ids),
            result.seed,
            result.stats,
            self.queued,
            tuple(self.tokens),
            tuple(result.logprobs),
            result.tool_calls,
            result.reasoning,
            self._words(result),
        )

    def _words(self, result: GenerationResult) -> str | None:
        """The answer before its first call, where a special token opens that."""
        stream, start = self.job.stream, result.answer_start
        if stream is None or not result.tool_calls:
            return None
        marks = [stream.length_of(i) for i, token in enumerate(result.token_ids) if token == self.job.call_mark]
        end = next((length for length in marks if length >= start), None)
        return None if end is None else result.answer[: end - len(result.text) + len(result.answer)]


def _kinds(from_draft: Sequence[bool], drafted: int, accepted: int) -> list[TokenKind]:
    """How each token of a step came about."""
    own: TokenKind = "plain" if not drafted else "bonus" if accepted == drafted else "recovered"
    return ["accepted" if flag else own for flag in from_draft]


class Generation:
    """An `Answer`: one request's texts. `take` is called on the engine's thread, everything else on the loop's."""

    def __init__(
        self, texts: Sequence[Text], mail: Mail, loop: asyncio.AbstractEventLoop, cancel: Callable[[Request], None]
    ) -> None:
        self.texts = texts
        self.finished: list[Finished | None] = [None] * len(texts)
        self._cancel = cancel
        self._mail = mail
        self._bell = Bell(loop)
        self._deltas: list[Delta] = []
        self._error: Exception | None = None
        self._left = len(texts)
        self._ended: Callable[[], None] = lambda: None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, ended: Callable[[], None], timer: asyncio.TimerHandle) -> None:
        """`ended` is called once, when the engine has let go of all texts; `timer` would end them before."""
        self._ended, self._timer = ended, timer

    def take(self, text: Text, output: StepOutput) -> None:
        """A step of one of the texts, or its end."""
        urgent = output.finish_reason is not None or text.last_step is None
        delta = text.take(output)
        if delta is not None and (text.stream or output.finish_reason):
            self._mail.post(partial(self._arrive, text, delta), urgent=urgent)

    def _arrive(self, text: Text, delta: Delta) -> None:
        self._deltas.append(delta)
        if delta.finish_reason is not None:
            self._end(text)
        self._bell.ring()

    def _end(self, text: Text) -> None:
        self.finished[text.index] = text.end()
        self._left -= 1
        if text.job.request.error is not None:
            self.fail(text.job.request.error)
        if not self._left:
            if self._timer is not None:
                self._timer.cancel()
            self._ended()

    def fail(self, error: Exception) -> None:
        """The whole request is lost; whoever waits is told why."""
        self._error = self._error or error
        self.cancel()
        self._bell.ring()

    def cancel(self) -> None:
        for text in self.texts:
            if self.finished[text.index] is None:
                self._cancel(text.job.request)

    async def deltas(self) -> AsyncIterator[Sequence[Delta]]:
        ended = 0
        while ended < len(self.texts):
            came = bool(self._deltas) or self._error is not None or await self._bell.wait(ALIVE_EVERY)
            if self._error is not None:
                raise self._error
            if came and not self._deltas:
                continue
            arrived, self._deltas = self._deltas, []
            ended += sum(delta.finish_reason is not None for delta in arrived)
            yield arrived

    async def wait(self) -> list[Finished]:
        while self._left and self._error is None:
            await self._bell.wait()
        if self._error is not None:
            raise self._error
        return [one for one in self.finished if one is not None]
