"""What memory there is: the machine's, or that of the container or service this process runs in, where that is less.

The one place that asks the system. Knows nothing of GPUs, models or caches.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"  # of control groups as they were before Linux 4.5
MEMINFO, CGROUP, OWN_CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes; None where the system does not tell."""

    total: int | None
    available: int | None


def memory() -> Memory:
    """Now."""
    sizes = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", _read(MEMINFO), re.MULTILINE)}
    total, available = sizes.get("MemTotal", _installed()), sizes.get("MemAvailable")
    for folder in _groups():
        names = ("memory.max", "memory.current") if (folder / "memory.max").exists() else V1
        limit, taken = (_read(folder / name).strip() for name in names)
        if limit.isdecimal():
            total = _least(total, int(limit))
            available = _least(available, max(0, int(limit) - int(taken or 0) + _files(folder)))
    return Memory(total, available)


def _groups() -> Iterator[Path]:
    """Folders of the control groups that hold this process, the outermost first."""
    for pattern, folder in ((r"^0::/(.*)$", CGROUP), (r"^\d+:(?:\w+,)*memory(?:,\w+)*:/(.*)$", CGROUP / "memory")):
        own = re.search(pattern, _read(OWN_CGROUP), re.MULTILINE)
        yield folder
        for part in Path(own[1]).parts if own else ():
            folder /= part
            yield folder


def _files(folder: Path) -> int:
    """Bytes read from files, which give way."""
    return sum(map(int, re.findall(r"^(?:in)?active_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)))


def _installed() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a Unix
        return None


def _least(known: int | None, limit: int) -> int:
    return limit if known is None else min(known, limit)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
