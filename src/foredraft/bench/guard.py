"""Runs one program under limits: `python -I guard.py MEMORY SECONDS NONCE < program`; see sandbox.py.

Stands alone: it is run by its path, and imports nothing of foredraft. It first gives up what the program must not have
(memory, processor time, a network, writing to files, other programs), then runs it. If that comes to its end, it
prints how the network was cut off, and NONCE; else the error. What the program prints goes nowhere.
"""

import ctypes
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

NEW_USER, NEW_NET = 0x10000000, 0x40000000  # of unshare(2)
NO_NEW_PRIVILEGES = 38  # of prctl(2)
CREATE_RULESET, RESTRICT_SELF = 444, 446  # system calls of landlock(7)
NOT_READING = 0x1FF3  # its first version's rights, without those to read files and list folders
FORBIDDEN = (
    "socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "os.setxattr", "os.removexattr", "resource.", "pty.", "shutil.", "tempfile.", "signal.pthread_kill",
    "urllib.", "http.", "ftplib.", "smtplib.", "sqlite3.",
)  # fmt: skip
NO_IMPORTS = ("_ctypes", "_posixshmem", "_posixsubprocess", "_socket")  # which do without an event of their own
NO_EVENTS = ("mkfifo", "mknod", "pidfd_open", "pidfd_send_signal", "sched_setaffinity", "setpriority", "nice")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    memory, seconds, nonce = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    program = compile(sys.stdin.read(), "<program>", "exec", dont_inherit=True)
    out, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    network = cut_network()
    only_reading()
    limit(memory, seconds)
    for module in (os, sys.modules["posix"], signal):
        for name in NO_EVENTS:
            vars(module).pop(name, None)
    sys.argv = ["program"]
    sys.addaudithook(forbidding(FORBIDDEN, NO_IMPORTS, WRITING))
    try:
        exec(program, {"__name__": "__program__"})
    except BaseException as error:  # also of leaving early
        os.write(out, f"{type(error).__name__}: {error}"[:200].encode(errors="replace"))
        os._exit(1)
    os.write(out, f"{network}\n{nonce}\n".encode())


def cut_network() -> str:
    """A network of one's own, with nothing in it, where the system lets us have one."""
    try:
        alone = ctypes.CDLL(None, use_errno=True).unshare(NEW_USER | NEW_NET) == 0
    except (OSError, AttributeError):
        alone = False
    return "namespace" if alone else "python"


def only_reading() -> None:
    """The kernel refuses to write, make or remove files and to start programs, where it has landlock (Linux 5.13)."""
    if sys.platform != "linux":
        return
    system = ctypes.CDLL(None, use_errno=True)
    rights = ctypes.c_uint64(NOT_READING)
    rules = system.syscall(CREATE_RULESET, ctypes.byref(rights), ctypes.c_size_t(8), 0)
    if rules >= 0:
        system.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        system.syscall(RESTRICT_SELF, rules, 0)
        os.close(rules)


def limit(memory: int, seconds: float) -> None:
    processor = math.ceil(seconds)
    for name, value in (("AS", memory), ("CPU", processor), ("FSIZE", 0), ("CORE", 0), ("NOFILE", 64)):
        kind = getattr(resource, f"RLIMIT_{name}")
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError):  # macOS has no limit of address space
            if name not in ("AS", "CORE"):
                raise


def forbidding(events: tuple[str, ...], imports: tuple[str, ...], writing: int) -> Callable[..., None]:
    """An audit hook; it cannot be taken away again, and what it goes by is nobody's global."""

    def forbid(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(events):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and isinstance(args[2], int) and args[2] & writing:
            raise PermissionError(f"writing to {args[0]!r} is not allowed here")
        if event == "import" and args[0] in imports:
            raise PermissionError(f"importing {args[0]} is not allowed here")

    return forbid


if __name__ == "__main__":
    main()
