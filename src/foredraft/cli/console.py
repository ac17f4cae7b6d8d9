"""What reaches the terminal: answers on stdout, everything else on stderr, and how a command ends.

Owns colour, encodings that lack a character, closed pipes, interrupts and exit codes. Knows nothing of models.
"""

import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

import typer

from foredraft.errors import ForedraftError, RequestError

FAILURE, WRONG_USE, INTERRUPTED = 1, 2, 130
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


@contextmanager
def guard() -> Iterator[None]:
    """Errors become one line and an exit code; a reader that has gone away (`| head -1`) is no error."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
        sys.stdout.flush()
    except RequestError as error:
        raise _failed(error, WRONG_USE) from error
    except ForedraftError as error:
        raise _failed(error, FAILURE) from error
    except KeyboardInterrupt:
        note("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        raise typer.Exit from None


def note(text: str) -> None:
    """A line beside the answer."""
    print(text, file=sys.stderr, flush=True)


def _failed(error: Exception, code: int) -> typer.Exit:
    note(f"foredraft: error: {' '.join(str(error).split())}")
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
            text = text.replace("\x1b", "\ufffd") if self.terminal else text  # a model must not steer the terminal
            sys.stdout.write(f"{GREEN}{text}{PLAIN}" if drafted and self.colour else text)
        sys.stdout.flush()

    def end(self) -> None:
        sys.stdout.write("\n")
        sys.stdout.flush()


def _has_colour() -> bool:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return False
    from rich.console import Console

    return Console().color_system is not None
