"""A program in a process of its own, with limits of time and memory, without a network.

On Linux the process gets a network namespace with nothing in it, and the kernel keeps it from writing to files and from
starting programs (landlock), each where the system allows that; everywhere an audit hook refuses sockets, other
processes, and writing to files. What it prints is thrown away. That keeps a model's mistakes from doing harm. It is no
prison for a program that means harm, which could also pretend to have passed: for that, run the whole bench in a
container.
"""

import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from foredraft.errors import RequestError

MOST_SAID = 4096  # bytes that are read of a program's report
GUARD = Path(__file__).with_name("guard.py")


@dataclass(frozen=True, slots=True)
class Limits:
    seconds: float = 5.0
    memory: int = 1 << 30  # bytes of address space


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Outcome:
    """`network`: how it was cut off, "namespace" or "python"; empty where the program did not come to its end."""

    passed: bool
    network: str = ""
    error: str = ""  # the last line that it left


def check_supported() -> None:
    """Raises RequestError where limits cannot be set."""
    if importlib.util.find_spec("resource") is None:
        raise RequestError(f"--run-code needs limits of time and memory, which {sys.platform} has not; leave it out")


def run_program(program: str, limits: Limits = LIMITS) -> Outcome:
    """Whether it comes to its end without an error."""
    nonce = secrets.token_hex(16)
    command = [sys.executable, "-I", "-B", str(GUARD), str(limits.memory), str(limits.seconds), nonce]
    try:
        source = program.encode()
    except UnicodeEncodeError as error:
        return Outcome(False, error=str(error))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as given:
        given.write(source)
        given.seek(0)
        process = subprocess.Popen(
            command,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": ""},
            start_new_session=True,
        )
        late = threading.Event()
        timer = threading.Timer(limits.seconds + 1.0, _stop, (process, late))  # a second to start in
        timer.start()
        assert process.stdout is not None
        said = process.stdout.read(MOST_SAID).decode(errors="replace")
        if len(said) == MOST_SAID:
            _stop(process)
        process.stdout.close()
        code = process.wait()
        timer.cancel()
        _stop(process)  # what it may have left behind
    lines = said.splitlines()
    if late.is_set():
        return Outcome(False, error=f"not done after {limits.seconds:g} s")
    if code == 0 and lines[-1:] == [nonce]:
        return Outcome(True, lines[-2])
    return Outcome(False, error=(lines or [f"exit code {code}"])[-1][:200])


def _stop(process: "subprocess.Popen[bytes]", said: threading.Event | None = None) -> None:
    """Kill it with all that it started."""
    if said is not None:
        said.set()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
