"""The flags as Markdown tables, embedded in the documentation.

python -m foredraft.cli.reference docs/cli.md docs/tuning.md
"""

import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args, get_type_hints

import typer

from foredraft.cli.doctor import DoctorOptions
from foredraft.cli.options import ChatOptions, GenerateOptions
from foredraft.cli.tune import TuneFlags

TABLES: dict[str, type] = {"generate": GenerateOptions, "chat": ChatOptions, "tune": TuneFlags, "doctor": DoctorOptions}
MARKED = re.compile(r"(<!-- flags of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


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
    return MARKED.sub(lambda match: f"{match[1]}\n{table(TABLES[match[2]])}\n\n{match[3]}", document)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(embed(path.read_text(encoding="utf-8")), encoding="utf-8")
