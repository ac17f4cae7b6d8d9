"""A program in a process of its own, with limits of time and memory, without a network.

On Linux the process gets a network namespace with nothing in it, where the system allows that; everywhere an audit hook
refuses sockets, other processes, and writing to files. That keeps a model's mistakes from doing harm. It is no prison
for a program that means harm: for that, run the whole bench in a container.
"""

import importlib.util
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from foredraft.errors import RequestError

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
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                command,
                input=program,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limits.seconds + 1.0,  # to start in
                cwd=folder,
                env={"PATH": ""},
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return Outcome(False, error=f"not done after {limits.seconds:g} s")
        except UnicodeEncodeError as error:
            return Outcome(False, error=str(error))
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines[-1:] == [nonce]:
        return Outcome(True, lines[-2])
    return Outcome(False, error=(done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1][:200])
