"""A diagnosis for people: sections of names and values, in 80 columns. Knows nothing of how it was found."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from foredraft.diagnosis.diagnose import Diagnosis, Failure, Version
from foredraft.diagnosis.machine import Machine

if TYPE_CHECKING:
    from foredraft.diagnosis.promises import Promise
    from foredraft.diagnosis.serving import Served, Serving, Torch

Lines = Iterator[tuple[str, str]]
NAME_WIDTH = 17
STATES = {"holds": "yes", "broken": "NO", "unclear": "unclear"}


def show(diagnosis: Diagnosis, console: Console) -> None:
    for title, lines in sections(diagnosis):
        console.print(title, style="bold")
        table = Table.grid(padding=(0, 2))
        table.add_column(width=NAME_WIDTH)
        table.add_column(overflow="fold")
        for name, value in lines:
            table.add_row(f"  {name}", value)
        console.print(table, markup=False)


def sections(diagnosis: Diagnosis) -> Iterator[tuple[str, Lines]]:
    yield "versions", (_version(entry) for entry in diagnosis.versions)
    yield "machine", _machine(diagnosis.machine)
    if diagnosis.torch:
        yield "torch", _torch(diagnosis.torch)
    if diagnosis.serving:
        yield f"model: {diagnosis.serving.target.name}", _serving(diagnosis.serving)
    if diagnosis.promises:
        yield "does it hold here?", (_promise(promise) for promise in diagnosis.promises)
    if diagnosis.failure:
        yield "failed", _failure(diagnosis.failure)
    yield ("all is well" if diagnosis.well else "something is broken"), iter(())


def _version(entry: Version) -> tuple[str, str]:
    tested = f" (tested: {entry.tested})" if entry.tested else ""
    complaint = f"; {entry.complaint}" if entry.complaint else ""
    return entry.package, f"{entry.installed or 'not installed'}{tested}{complaint}"


def _machine(m: Machine) -> Lines:
    yield "system", m.system
    yield "processor", m.processor
    yield "features", " ".join(m.features) or "unknown"
    yield "cores", f"{m.cores}, of which this process may use {m.usable_cores}"
    yield "memory", f"{size(m.memory_total)}, {size(m.memory_available)} available"


def _torch(t: "Torch") -> Lines:
    yield "threads", f"{t.threads} (OMP_NUM_THREADS={t.omp_num_threads or ''})"
    yield "instructions", t.instructions
    yield "packed weights", ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in t.packing.items())
    yield "devices", "; ".join(("cpu", *t.devices))


def _serving(s: "Serving") -> Lines:
    yield "target", _served(s.target)
    yield "drafter", f"{s.drafter}: {_served(s.draft)}" if s.draft else s.drafter
    if s.reasons:
        yield "chosen among", "; ".join(f"{name}: {why}" for name, why in s.reasons.items())
    yield "probe", s.probe
    weights, added = s.memory["target_weights"], s.memory["draft_weights"]
    yield "weights", size(weights) + (f", and {size(added)} to draft with" if added else "")
    yield (
        "cache",
        f"{size(s.cache_bytes_per_token)} a token, {size(s.cache_bytes_per_token * s.context)} at {s.context}",
    )
    yield "loaded in", f"{s.seconds_to_load:.1f} s"


def _served(s: "Served") -> str:
    kernels = ", ".join(f"{count} layers {kernel}" for kernel, count in s.kernels.items())
    instructions = f" ({s.instructions})" if s.instructions else ""
    return f"{s.type} in {s.dtype} on {s.device}; runtime {s.runtime}{instructions}, {s.modules}; {kernels}"


def _promise(promise: "Promise") -> tuple[str, str]:
    return promise.name, f"{STATES[promise.state]}: {promise.why}"


def _failure(failure: Failure) -> Lines:
    yield "while", failure.doing
    yield "error", failure.error
    yield "at", failure.where


def size(count: int | None) -> str:
    if count is None:
        return "unknown"
    units = iter(("B", "KiB", "MiB", "GiB", "TiB"))
    value, unit = float(count), next(units)
    while value >= 1024 and unit != "TiB":
        value, unit = value / 1024, next(units)
    return f"{value:.3g} {unit}"
