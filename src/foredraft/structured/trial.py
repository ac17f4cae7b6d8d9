"""Trials: a form is compiled in a process of its own first, since nothing bounds what a stranger's form may take.

Some small forms take minutes or all memory, or run out of stack, which ends a process. A trial is stopped after a time,
and what survives it is compiled here. As a program (`python -m foredraft.structured.trial`): a line of JSON in with a
form and the vocabulary's size and marks, a line out with where a fault is.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from typing import Any, TextIO

from foredraft.errors import GrammarError, LateError
from foredraft.structured.source import guilty, limits, source_of
from foredraft.structured.spec import Structured

SECONDS = 10.0  # of a processor
PATIENCE = 6  # times as long by the clock, on a machine that has other things to do
SECONDS_TO_START = 60.0
STACK = 4 << 20  # bytes; threads that follow a grammar have more
MEMORY = 4 << 30  # bytes of addresses
READY = "null"

Child = subprocess.Popen[str]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a grammar may name of a vocabulary."""

    size: int
    marks: tuple[str, ...]  # tokens that are no text


class Trials:
    """Processes that try forms, one form at a time each; started when needed, and kept."""

    def __init__(self) -> None:
        self._idle: list[Child] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _end_all, self._idle)

    def run(self, form: Structured, vocabulary: Vocabulary, seconds: float = SECONDS) -> str | None:
        """Where the fault of a JSON schema is, if it has one. Waits for a process; threads may call it side by side.

        Raises:
            LateError: it takes longer than this.
            GrammarError: it ends the process.
        """
        child = self._child()
        if child is None:
            return None
        assert child.stdin is not None
        with contextlib.suppress(OSError):  # it ended: no answer
            child.stdin.write(json.dumps([asdict(form), asdict(vocabulary), seconds]) + "\n")
            child.stdin.flush()
        answer, late = _line(child, PATIENCE * seconds)
        if answer:
            with self._lock:
                self._idle.append(child)
            at: str | None = json.loads(answer)
            return at
        _end_all([child])
        if late or child.returncode == -getattr(signal, "SIGXCPU", 0):
            raise LateError(f"the {form.name} takes longer than {seconds:g} s to compile; make it simpler")
        raise GrammarError(
            f"the {form.name} cannot be compiled: it takes too much memory, or refers too deep; make it simpler"
        )

    def _child(self) -> Child | None:
        """A process that waits for a form; None, and a warning, where none can be started."""
        with self._lock:
            while self._idle:
                child = self._idle.pop()
                if child.poll() is None:
                    return child
                _end_all([child])
        if getattr(sys, "frozen", False) or not sys.executable:
            _unguarded("this program is packed into one file")
            return None
        try:
            child = _start()
        except OSError as error:
            _unguarded(str(error))
            return None
        if _line(child, SECONDS_TO_START)[0].strip() == READY:
            return child
        _end_all([child])
        _unguarded(f"{sys.executable} -m {__name__} ended")
        return None


def trials() -> Trials:
    """Those of this process; a forked child has its own."""
    return _trials_of(os.getpid())


@cache
def _trials_of(process: int) -> Trials:
    return Trials()


def _unguarded(why: str) -> None:
    warnings.warn(
        f"no process can be started to try the forms of structured output ({why}): they are compiled in this one, "
        "where one that takes too long or too much memory holds up the others or ends it",
        RuntimeWarning,
        stacklevel=2,
    )


def _start() -> Child:
    path = os.pathsep.join(part or os.getcwd() for part in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": path},
    )


def _line(child: Child, seconds: float) -> tuple[str, bool]:
    """The next line that the process writes, and whether it was ended for taking longer than this."""
    late = threading.Event()

    def end() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    assert child.stdout is not None
    line = child.stdout.readline()
    timer.cancel()
    return line, late.is_set()


def _end_all(children: list[Child]) -> None:
    while children:
        child = children.pop()
        child.kill()
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):  # what is still to be written has nowhere to go
                pipe.close()  # type: ignore[union-attr]  # both are pipes
        child.wait()


# --- in the process of its own --------------------------------------------------------------------------------------


def answer_all(asked: TextIO, answers: TextIO) -> None:
    print(READY, file=answers, flush=True)
    for line in asked:
        form, vocabulary, seconds = json.loads(line)
        _stop_after(seconds)
        known = Vocabulary(vocabulary["size"], tuple(vocabulary["marks"]))
        print(json.dumps(attempt(Structured(**form), known)), file=answers, flush=True)


def attempt(form: Structured, vocabulary: Vocabulary) -> str | None:
    """Compile it and compute a first mask, for what that takes. Where the fault of a JSON schema is, if it has one."""
    from llguidance import LLMatcher

    try:
        source = source_of(form)
    except GrammarError:
        return None  # found again, and told, by who asked
    matcher = LLMatcher(_bytes(vocabulary), source, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
        return None
    return guilty(json.loads(form.source)) if form.kind == "json_schema" else None


@lru_cache(maxsize=4)
def _bytes(vocabulary: Vocabulary) -> Any:
    """A vocabulary of bytes and marks, as large as this one."""
    from llguidance import LLTokenizer
    from llguidance._tokenizer import TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes(vocabulary)))


class _Bytes:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        marks = [mark.encode() for mark in vocabulary.marks] or [b"<end>"]
        self.tokens = [bytes([byte]) for byte in range(256)] + marks
        self.tokens += [b""] * (vocabulary.size - len(self.tokens))
        self.special_token_ids = range(256, 256 + len(marks))
        self.eos_token_id = 256

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _stop_after(seconds: float) -> None:
    """End this process when it has computed for so long."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        end = math.ceil(time.process_time() + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _lower_limits() -> None:
    """Little memory, little stack, and whatever else runs goes first. Ctrl-C is for who asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.stack_size(STACK)
    with contextlib.suppress(ImportError, OSError, ValueError):
        os.nice(5)
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    _lower_limits()
    thread = threading.Thread(target=answer_all, args=(sys.stdin, sys.stdout))
    thread.start()
    thread.join()
