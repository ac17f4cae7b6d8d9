"""Runner: the one driver of the engine, whoever asks and however many.

Owns who drives, what waits between two steps, and who hears what a step brought. Knows nothing of text or tokens.

Any thread may `submit` and `cancel`; neither waits for a step. Steps are made by whichever thread needs them:
`run_until` drives, or sleeps while another thread drives, and the role passes on in the order of arrival. A server
calls `start` instead, which drives on a thread of its own until `stop`.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from time import perf_counter
from types import TracebackType
from typing import Protocol, Self

from foredraft.engine import Engine
from foredraft.errors import RequestError, StoppedError
from foredraft.types import FinishReason, Phase, Request, StepOutput


class Sink(Protocol):
    """Takes what a step gave one request. The last output of a request, and only the last, has a `finish_reason`.

    Called on the thread that drives, between two passes: it must not block. One that raises ends its own request with
    that error, of which it is told too. From asyncio, hand the output over with `loop.call_soon_threadsafe`.
    """

    def __call__(self, output: StepOutput, /) -> object: ...


class Turn:
    """A thread inside `run_until`: what it waits for, and how it is woken when that is there or it is to drive."""

    __slots__ = ("done", "wake")

    def __init__(self, done: Callable[[], bool]) -> None:
        self.done = done
        self.wake = threading.Event()


class Runner:
    """Drives one engine for all threads. Nobody else calls the engine's `step`, `add` or `abort`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._open = True
        self._begin()

    def _begin(self) -> None:
        """Nobody drives, and nothing was asked for."""
        self._process = os.getpid()
        self._sinks: dict[Request, Sink] = {}  # of requests that have not ended, those on their way in included
        # a SimpleQueue, whose `put` may interrupt another: the garbage collector cancels streams
        self._intake: SimpleQueue[Callable[[], None]] = SimpleQueue()  # what is to be done before the next step
        self._lock = threading.Lock()  # of `_turns`; held to look at it, never during a step
        self._turns: deque[Turn] = deque()  # the first one drives
        self._inside: int | None = None  # the thread that drives, while it does
        self._gate = threading.RLock()  # of `_open`: nothing slips in while the runner stops
        self._control = threading.Lock()  # of `_thread`: `start` and `stop` come one after the other
        self._thread: threading.Thread | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._sinks)

    def _heed_fork(self) -> None:
        """A forked child has none of its parent's threads, and what they held is held for ever there: begin anew.

        Where others drove, a step may have been cut in two, and what ran is theirs: it ends here with a StoppedError.
        """
        if self._process == os.getpid():
            return
        alone, sinks, intake = not self._turns and self._thread is None, self._sinks, self._intake
        self._begin()
        self._sinks = sinks
        if alone:
            self._intake = intake
        else:
            self._end_all(StoppedError("this process was forked from the one that decodes this request"))

    def submit(self, request: Request, sink: Sink) -> None:
        """Hand a new request over; it takes part from the next step on.

        Raises:
            StoppedError: the runner was stopped.
            RequestError: the request was submitted before.
        """
        self._heed_fork()
        with self._gate:
            if not self._open:
                raise StoppedError("the runner was stopped and takes no requests; call start() first")
            if request in self._sinks or request.phase is not Phase.WAITING:
                raise RequestError("this request was submitted before; make a new one")
            request.arrived = perf_counter()
            self._sinks[request] = sink
            self._intake.put(partial(self._admit, request))

    def cancel(self, request: Request) -> None:
        """End a request before the next step, unless it has ended. Its sink hears of that: `finish_reason` "abort"."""
        self._heed_fork()
        if request in self._sinks:
            self._intake.put(partial(self._drop, request))
            self._settle()

    def run_until(self, done: Callable[[], bool]) -> None:
        """Drive, or wait while another thread drives, until `done()`.

        `done` is asked after each step, also by other threads; it must depend on what sinks were told.

        Raises:
            RequestError: called by a sink, a processor or a drafter, that is, from within a step.
        """
        self._heed_fork()
        self._check_outside()
        turn = Turn(done)
        try:
            self._enter(turn)
            while not done():
                if self._turns[0] is turn:
                    self._advance()
                else:
                    turn.wake.wait()
                    turn.wake.clear()
        finally:
            self._leave(turn)

    def start(self) -> Self:
        """Drive on a background thread, which sleeps while there is nothing to do."""
        self._heed_fork()
        with self._control:
            self._open = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="foredraft-runner", daemon=True)
                self._thread.start()
        return self

    def stop(self, timeout: float = 0.0) -> None:
        """Take no more requests; give those there are `timeout` seconds, then end the rest with a StoppedError.

        Every sink has heard the end of its request when this returns. A step that runs is not interrupted. `start`
        opens the runner again.
        """
        self._heed_fork()
        self._check_outside()
        with self._control:
            with self._gate:
                self._open = False
            deadline = perf_counter() + timeout
            self.run_until(lambda: not self.has_work or perf_counter() >= deadline)
            error = StoppedError("the runner was stopped before this request was finished")
            self._intake.put(partial(self._end_all, error))
            self.run_until(lambda: not self.has_work)
            thread, self._thread = self._thread, None
            if thread is not None:
                self._intake.put(_nothing)  # wakes it
                thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- who drives -------------------------------------------------------------------------------------------------

    def _enter(self, turn: Turn) -> None:
        with self._lock:
            self._turns.append(turn)

    def _leave(self, turn: Turn) -> None:
        """Pass the role on, if there is anybody, and do what was asked for since the last step."""
        with self._lock:
            if turn in self._turns:
                self._turns.remove(turn)
            if self._turns:
                self._turns[0].wake.set()
        self._settle()

    def _settle(self) -> None:
        """Where nobody drives, do what was asked for: a cancelled request must not wait for the next one to come.

        It never waits, since the garbage collector may call it anywhere: who holds the lock comes here after that.
        """
        while not self._intake.empty() and self._lock.acquire(blocking=False):
            turn = Turn(lambda: True)
            try:
                if self._turns:
                    return  # who drives will see to it
                self._turns.append(turn)
            finally:
                self._lock.release()
            try:
                self._take_in()
            finally:
                with self._lock:
                    self._turns.remove(turn)
                    if self._turns:
                        self._turns[0].wake.set()

    def _serve(self) -> None:
        while self._open or self.has_work:
            with suppress(BaseException):  # it ended the requests of that step, each of which has it
                self.run_until(lambda: not (self._open or self.has_work))

    def _check_outside(self) -> None:
        if self._inside == threading.get_ident():
            raise RequestError("a step cannot wait for another step; call this from outside, or from another thread")

    # --- what whoever drives does -----------------------------------------------------------------------------------

    def _advance(self) -> None:
        """What was asked for, one step, and its outputs to their sinks. Sleeps while there is nothing to do."""
        self._take_in(wait=not self.engine.has_work)
        self._step()
        with self._lock:
            turns = list(self._turns)
        for turn in turns:
            if turn.done():
                turn.wake.set()

    def _take_in(self, *, wait: bool = False) -> None:
        if not wait and self._intake.empty():
            return
        with suppress(Empty):
            command = self._intake.get(wait)
            self._inside = threading.get_ident()
            try:
                while True:
                    command()
                    command = self._intake.get_nowait()
            finally:
                self._inside = None

    def _step(self) -> None:
        self._inside = threading.get_ident()
        try:
            for output in self.engine.step():
                self._deliver(output)
        except BaseException:  # Ctrl-C, say: what the others got of this step may be lost
            error = StoppedError("the step that this request took part in was interrupted")
            for request in list(self._sinks):
                if request.phase is not Phase.WAITING:
                    self._fail(request, error)
            raise
        finally:
            self._inside = None

    def _admit(self, request: Request) -> None:
        if request.phase is Phase.WAITING:
            try:
                self.engine.add(request)
            except Exception as error:
                self._fail(request, error)

    def _drop(self, request: Request) -> None:
        self.engine.abort(request)
        self._tell_end(request, "abort")

    def _end_all(self, error: Exception) -> None:
        for request in list(self._sinks):
            self._fail(request, error)

    def _deliver(self, output: StepOutput) -> None:
        sink = self._sinks.get(output.request)
        if sink is None:
            return
        try:
            sink(output)
        except Exception as error:
            self._fail(output.request, error)
        else:
            if output.finish_reason:
                del self._sinks[output.request]

    def _fail(self, request: Request, error: Exception) -> None:
        self.engine.fail(request, error)
        self._tell_end(request, "error")

    def _tell_end(self, request: Request, reason: FinishReason) -> None:
        sink = self._sinks.pop(request, None)
        if sink is not None:
            with suppress(Exception):  # it has raised already, or its request has ended anyway
                sink(StepOutput(request, (), (), reason))


def _nothing() -> None:
    pass
