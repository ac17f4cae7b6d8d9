"""`foredraft convert`: a checkpoint in fewer bits."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from foredraft.cli.console import busy, interruptible
from foredraft.cli.options import OUTPUT, RemoteCodeFlag, flag, takes

if TYPE_CHECKING:
    from foredraft.weights.convert import Conversion

UNITS = ("B", "KB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    model: Annotated[str, typer.Argument(help="What to convert: a folder, a hub name, or a .gguf file.")]
    out: Annotated[str, typer.Argument(help="The folder to write.")]
    weight_format: Annotated[str, flag("--weight-format", help="int4, int8, bf16 or fp16.", panel=OUTPUT)] = "int4"
    group_size: Annotated[
        int | None,
        flag(
            "--group-size",
            help="Inputs that share a scale, of int4: 32, 64, 128 or 256. Default: chosen for each layer.",
            panel=OUTPUT,
        ),
    ] = None
    max_shard_size: Annotated[str, flag("--max-shard-size", help="Largest file, as 500MB or 2GB.", panel=OUTPUT)] = (
        "2GB"
    )
    overwrite: Annotated[bool, flag("--overwrite", help="Replace OUT, if it is a checkpoint.", panel=OUTPUT)] = False
    trust_remote_code: RemoteCodeFlag = False


@takes(ConvertOptions)
def convert(options: ConvertOptions) -> None:
    """Write MODEL to the folder OUT in fewer bits a weight; `--model OUT` then runs it."""
    with busy("importing torch and transformers"):
        from foredraft.weights.convert import convert as write
    interruptible()
    with progress_bar(f"{options.weight_format} of {options.model}") as report:
        conversion = write(
            options.model,
            options.out,
            options.weight_format,  # type: ignore[arg-type]  # checked there
            group_size=options.group_size,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            trust_remote_code=options.trust_remote_code,
            progress=report,
        )
    print(summary(options, conversion))


def summary(options: ConvertOptions, conversion: "Conversion") -> str:
    before, after = conversion.source_bytes, conversion.bytes
    layers = f"{conversion.quantised} layers in {options.weight_format}" if conversion.quantised else ""
    parts = [layers or options.weight_format, f"{conversion.shards} file{'s' if conversion.shards > 1 else ''}"]
    return (
        f"{options.model} ({size(before)}) -> {options.out} ({size(after)}, {after / before:.0%}): {', '.join(parts)}"
    )


def size(count: float) -> str:
    """Bytes for people: three digits."""
    unit = 0
    while count >= 999.5 and unit + 1 < len(UNITS):
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {UNITS[unit]}"


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """How much of the source is done, on a terminal's stderr."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
