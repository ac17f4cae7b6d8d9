"""Runs one program under limits: `python -I guard.py MEMORY SECONDS NONCE < program`; see sandbox.py.

Stands alone: it is run by its path, and imports nothing of foredraft. It first gives up what the program must not have
(memory, processor time, a network, other processes, writing to files), then runs it. If that comes to its end, it
prints how the network was cut off, and NONCE.
"""

import ctypes
import math
import os
import resource
import sys
from typing import Any

NEW_USER, NEW_NET = 0x10000000, 0x40000000  # of unshare(2)
FORBIDDEN = (
    "socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "pty.", "shutil.", "tempfile.", "signal.pthread_kill", "urllib.", "http.", "ftplib.", "smtplib.", "sqlite3.",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    memory, seconds, nonce = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    program = compile(sys.stdin.read(), "<program>", "exec", dont_inherit=True)
    network = cut_network()
    limit(memory, seconds)
    out, sys.argv = os.dup(1), ["program"]
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.addaudithook(forbid)
    try:
        exec(program, {"__name__": "__program__"})
    except BaseException as error:  # also of leaving early
        os.write(2, f"{type(error).__name__}: {error}".encode(errors="replace")[:200])
        os._exit(1)
    os.write(out, f"{network}\n{nonce}\n".encode())


def cut_network() -> str:
    """A network of one's own, with nothing in it, where the system lets us have one."""
    try:
        alone = ctypes.CDLL(None, use_errno=True).unshare(NEW_USER | NEW_NET) == 0
    except (OSError, AttributeError):
        alone = False
    return "namespace" if alone else "python"


def limit(memory: int, seconds: float) -> None:
    processor = math.ceil(seconds)
    for name, value in (("AS", memory), ("CPU", processor), ("FSIZE", 0), ("CORE", 0), ("NOFILE", 64)):
        kind = getattr(resource, f"RLIMIT_{name}")
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError):  # macOS has no limit of address space
            if name not in ("AS", "CORE"):
                raise


def forbid(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook, which a program cannot take away again."""
    if event.startswith(FORBIDDEN):
        raise PermissionError(f"{event} is not allowed here")
    if event == "open" and isinstance(args[2], int) and args[2] & WRITING:
        raise PermissionError(f"writing to {args[0]!r} is not allowed here")


if __name__ == "__main__":
    main()
