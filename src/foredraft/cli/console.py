"""What reaches the terminal: answers on stdout, everything else on stderr, and how a command ends.

Owns colour, encodings that lack a character, closed pipes, interrupts and exit codes. Knows nothing of models.
"""

import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import typer

from foredraft.errors import ForedraftError, GrammarError, RequestError

if TYPE_CHECKING:
    from rich.console import Console

FAILURE, WRONG_USE, INTERRUPTED = 1, 2, 130
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


@contextmanager
def guard() -> Iterator[None]:
    """Errors become one line and an exit code; a reader that has gone away (`| head -1`) is no error."""
    if sys.stderr is None:  # closed by the process that started us
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # never closed: needed until we exit
    if sys.stdout is None:
        raise _failed(OSError("stdout is closed; there is nowhere to print to"), FAILURE)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
        with printing():
            sys.stdout.flush()
    except RequestError as error:
        raise _failed(error, WRONG_USE) from error
    except ForedraftError as error:
        raise _failed(error, FAILURE) from error
    except KeyboardInterrupt:
        note("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        _abandon_stdout()
        raise typer.Exit from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EDQUOT):
            _abandon_stdout()
        raise _failed(error, FAILURE) from error


class StdoutError(ForedraftError):
    """Standard output takes no more; nobody who reads it can be told."""


@contextmanager
def printing() -> Iterator[None]:
    """What is written to stdout inside is a result; raises StdoutError where that fails (a full disk)."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _abandon_stdout()
        raise StdoutError(f"standard output cannot be written: {error.strerror}") from error


def write_result(stdout: TextIO, text: str) -> None:
    """The one object of `--json`. Raises StdoutError."""
    with printing():
        stdout.write(text + "\n")
        stdout.flush()


def _abandon_stdout() -> None:
    """Drop what could not be written, as the interpreter's last flush would fail with a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)


def leave_at_once(*_: object) -> None:
    """Ctrl-C during imports, where libraries may swallow a KeyboardInterrupt or abort on it; nothing is lost yet."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def interruptible() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def note(text: str) -> None:
    """A line beside the answer."""
    print(text, file=sys.stderr, flush=True)


def _failed(error: Exception, code: int) -> typer.Exit:
    told = str(error).rstrip() if isinstance(error, GrammarError) else " ".join(str(error).split())
    note(f"foredraft: error: {told}")  # a form's faulty lines are shown as they are, with a mark below the place
    return typer.Exit(code)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    note(f"foredraft: warning: {message}")


@contextmanager
def only_result() -> Iterator[TextIO]:
    """The real stdout, while whatever else is printed inside goes to stderr."""
    stdout = sys.stdout
    sys.stdout = sys.stderr
    try:
        yield stdout
    finally:
        sys.stdout = stdout


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A sign of life on a terminal's stderr."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def stdout_console(**options: Any) -> "Console":
    """rich's console on stdout, which leaves a closed pipe to `guard`."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise

    return Piped(**options)


@dataclass(slots=True)
class Printer:
    """Writes text as it arrives, drafted tokens in colour on a terminal that has any."""

    colour: bool = field(default_factory=lambda: _has_colour())
    terminal: bool = field(default_factory=lambda: sys.stdout.isatty())
    skip_space: bool = False  # at the start of a chat turn
    at_start: bool = True

    def write(self, pieces: Iterable[tuple[str, bool]]) -> None:
        for text, drafted in pieces:
            if self.at_start and self.skip_space:
                text = text.lstrip()
            if not text:
                continue
            self.at_start = False
            text = text.replace("\x1b", "\ufffd") if self.terminal else text  # no escape sequences from a model
            self._print(f"{GREEN}{text}{PLAIN}" if drafted and self.colour else text)
        self._print("", flush=True)

    def end(self) -> None:
        self._print("\n", flush=True)

    @staticmethod
    def _print(text: str, *, flush: bool = False) -> None:
        with printing():
            print(text, end="", flush=flush)


def _has_colour() -> bool:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return False
    from rich.console import Console

    return Console().color_system is not None
