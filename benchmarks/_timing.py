"""Interleaved arms, medians and spread, one JSON report: how every benchmark here measures.

Arms take turns within a round, so that a machine whose speed drifts is unfair to none. An error aborts; no number is
ever reused. Knows nothing of what is measured.
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

Arm = Callable[[], float]
"""Runs once and returns its figure (tokens per second, milliseconds, ...)."""


def parser(doc: str | None, *, rounds: int) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="measured rounds, after one warm-up")
    made.add_argument("--threads", type=int, default=2, help="torch threads")
    made.add_argument("--out", type=Path, help="where to write the JSON report")
    return made


def interleave(arms: Mapping[str, Arm], rounds: int, *, warm_up: bool = True) -> dict[str, list[float]]:
    """One warm-up of every arm, then `rounds` figures of each, taken in turn; every other round in reverse order."""
    for arm in arms.values() if warm_up else ():
        arm()
    figures: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(rounds):
        order = list(arms) if index % 2 == 0 else list(reversed(arms))
        for name in order:
            figures[name].append(arms[name]())
    return figures


def seconds(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def median_ms(work: Callable[[], object], repeats: int = 20, at_most: float = inf) -> float:
    """Milliseconds of one call after a first one, the median of `repeats` or of what `at_most` seconds had room for."""
    work()
    taken = [seconds(work)]
    while len(taken) < repeats and sum(taken) < at_most:
        taken.append(seconds(work))
    return 1e3 * sorted(taken)[len(taken) // 2]


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def paired_ratio(figures: Mapping[str, list[float]], over: str, under: str) -> dict[str, float]:
    """`over` / `under`, round by round."""
    return summary([a / b for a, b in zip(figures[over], figures[under], strict=True)])


def machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def report(name: str, results: Mapping[str, Any], out: Path | None) -> None:
    """Print the report, and write it where asked."""
    text = json.dumps({"benchmark": name, "machine": machine(), "results": results}, indent=2)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
