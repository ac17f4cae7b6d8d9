"""The flags and the drafters as Markdown tables, embedded in the documentation.

python -m foredraft.cli.reference docs/cli.md docs/tuning.md docs/bench.md docs/audit.md
"""

import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args, get_type_hints

import typer

from foredraft.cli.audit import AuditFlags
from foredraft.cli.bench import BenchFlags
from foredraft.cli.doctor import DoctorOptions
from foredraft.cli.launch import LaunchOptions, ListOptions, TerminateOptions
from foredraft.cli.options import ChatOptions, GenerateOptions
from foredraft.cli.serve import ServeOptions
from foredraft.cli.tune import TuneFlags
from foredraft.drafters.registry import DRAFTERS

TABLES: dict[str, type] = {
    "generate": GenerateOptions,
    "chat": ChatOptions,
    "tune": TuneFlags,
    "bench": BenchFlags,
    "audit": AuditFlags,
    "doctor": DoctorOptions,
    "serve": ServeOptions,
    "launch": LaunchOptions,
    "list": ListOptions,
    "terminate": TerminateOptions,
}
MARKED = re.compile(r"(<!-- (?:flags of (\w+)|drafters) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(options: type) -> str:
    """One row for each flag, in the order of `--help`."""
    hints = get_type_hints(options, include_extras=True)
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for spec in fields(options):
        info = get_args(hints[spec.name])[1]
        shown = not any(spec.default is nothing for nothing in (MISSING, None, False))
        rows.append(f"| {names(spec.name, info)} | {f'`{spec.default}`' if shown else ''} | {info.help} |")
    return "\n".join(rows)


def names(field: str, info: object) -> str:
    """All spellings of a flag. (typer keeps the first of them as `default` where a flag is declared by annotation.)"""
    if not isinstance(info, typer.models.OptionInfo):
        return f"`{field.upper()}`"
    spellings = [str(info.default), *(info.param_decls or ())]
    return " ".join(f"`{name.strip(' /').replace('/', '` `')}`" for name in spellings)


def embed(document: str) -> str:
    """The document with every marked table renewed."""

    def renewed(match: re.Match[str]) -> str:
        text = drafters() if match[2] is None else table(TABLES[match[2]])
        return f"{match[1]}\n{text}\n\n{match[3]}"

    return MARKED.sub(renewed, document)


def drafters() -> str:
    """One row for each drafter that has a name."""
    rows = ["| name | drafts with | needs |", "|---|---|---|"]
    for kind in DRAFTERS.values():
        needs = "a [profile](self-drafting.md#profiles)" if kind.needs_profile else ""
        rows.append(f"| `{kind.name}` | {kind.help} | {needs} |")
    return "\n".join(rows)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(embed(path.read_text(encoding="utf-8")), encoding="utf-8")
