"""Whether the machine is busy with something else while costs are measured.

Two signs: the share of all processors that other processes used (on Linux, with time stolen by the host), and the share
of a short busy loop that this thread spent waiting for a processor (everywhere). Knows nothing of models; clocks and
counters are parameters, so that tests can set them.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPIN = 0.004  # seconds of a busy loop
OTHERS = 0.10  # of all processors: from here on the machine counts as busy
WAITED = 0.08  # of a busy loop's time


@dataclass(frozen=True, slots=True)
class Load:
    """Shares in [0, 1]. `others`: of all processors' time, what other processes took; None if not known."""

    others: float | None = None
    waited: float = 0.0  # of a busy loop's time, what it spent waiting for a processor

    @property
    def busy(self) -> bool:
        return self.waited > WAITED or (self.others or 0.0) > OTHERS

    def as_dict(self) -> dict[str, Any]:
        return {"busy": self.busy, "others": self.others, "waited": self.waited}

    def __str__(self) -> str:
        used = "" if self.others is None else f"other processes took {self.others:.0%} of its processors, and "
        return f"{used}this one waited {self.waited:.0%} of the time that it wanted to run"


UNWATCHED = Load()


def _machine_seconds(path: Path = Path("/proc/stat")) -> float | None:
    """Seconds that all processors have been busy since they started; None where the system does not say.

    The columns are user, nice, system, idle, iowait, irq, softirq, steal (proc(5)).
    """
    try:
        fields = [int(value) for value in path.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        idle = fields[3] + fields[4]
        return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


@dataclass(frozen=True, slots=True)
class Counters:
    """Where readings come from, in seconds: a clock, and processor time of this thread, this process, everybody."""

    clock: Callable[[], float] = time.perf_counter
    thread: Callable[[], float] = time.thread_time
    process: Callable[[], float] = time.process_time
    machine: Callable[[], float | None] = _machine_seconds
    processors: int = os.cpu_count() or 1


@dataclass(slots=True)
class LoadMeter:
    """Watches from its making on. Call `sample` now and then: each runs a busy loop of a few milliseconds."""

    counters: Counters = field(default_factory=Counters)
    began: tuple[float, float, float | None] = field(init=False)
    spun: float = 0.0
    ran: float = 0.0

    def __post_init__(self) -> None:
        self.began = self._read()

    def _read(self) -> tuple[float, float, float | None]:
        c = self.counters
        return c.clock(), c.process(), c.machine()

    def sample(self) -> None:
        clock, thread = self.counters.clock, self.counters.thread
        began, ran = clock(), thread()
        while clock() - began < SPIN:
            pass
        self.spun += clock() - began
        self.ran += thread() - ran

    @property
    def load(self) -> Load:
        """What was seen so far."""
        waited = max(0.0, 1 - self.ran / self.spun) if self.spun else 0.0
        return Load(self._others(), waited)

    def _others(self) -> float | None:
        (began, own, all_began), (now, own_now, all_now) = self.began, self._read()
        if all_began is None or all_now is None or now <= began:
            return None
        foreign = (all_now - all_began) - (own_now - own)
        return min(1.0, max(0.0, foreign / ((now - began) * self.counters.processors)))
