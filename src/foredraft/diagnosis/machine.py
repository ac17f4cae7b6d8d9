"""The machine as far as it matters to speed and exactness: processor, cores, memory. Names neither it nor its user.

Knows nothing of torch. What a system does not tell is None or empty.
"""

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from foredraft.memory import memory

X86 = (
    "sse4_2", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
)  # fmt: skip
ARM = {"asimd": "neon", "asimddp": "dotprod", "asimdhp": "fp16", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve"}
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Machine:
    system: str
    processor: str
    features: tuple[str, ...]
    cores: int
    usable_cores: int  # by this process's affinity
    memory_total: int | None  # bytes, or what a container may take
    memory_available: int | None


def look() -> Machine:
    """This machine."""
    about = _read(CPUINFO)
    found = memory()
    return Machine(
        f"{platform.system()} {platform.machine()}",
        processor(about) or _asked("machdep.cpu.brand_string") or platform.processor() or "unknown",
        features(about),
        os.cpu_count() or 1,
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        found.total,
        found.available,
    )


def processor(cpuinfo: str) -> str:
    """The model's name. Arm processors give numbers instead."""
    name = re.search(r"^model name\s*: (.*)", cpuinfo, re.MULTILINE)
    if name:
        return name[1].strip()
    part = re.search(r"^CPU implementer\s*: (\S+).*?^CPU part\s*: (\S+)", cpuinfo, re.MULTILINE | re.DOTALL)
    return f"Arm, implementer {part[1]}, part {part[2]}" if part else ""


def features(cpuinfo: str) -> tuple[str, ...]:
    """Those of its instruction sets that kernels choose by."""
    flags = re.search(r"^(?:flags|Features)\s*: (.*)", cpuinfo, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    found = tuple(name for name in X86 if name in known) or tuple(ARM[name] for name in ARM if name in known)
    return found or (("neon",) if platform.machine() in ("arm64", "aarch64") else ())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _asked(name: str) -> str:
    """What macOS says."""
    if sys.platform != "darwin":
        return ""
    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True).stdout.strip()
