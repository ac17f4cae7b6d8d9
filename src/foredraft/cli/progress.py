"""How far a long command is: a bar for each stage on a terminal, a line for each stage elsewhere; both on stderr."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from foredraft.cli.console import note

if TYPE_CHECKING:
    from foredraft.tuning.options import Watcher


@contextmanager
def progress() -> "Iterator[Watcher]":
    """A bar for each stage on a terminal's stderr; a line for each stage elsewhere."""
    from foredraft.tuning.options import Watcher

    if not sys.stderr.isatty():
        yield Watcher(lambda stage, total: note(f"{stage} ..."))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def stage(name: str, total: int) -> None:
            bar.add_task(name, total=total or None, text="")

        def tick(text: str) -> None:
            task = bar.tasks[-1]
            bar.update(task.id, advance=1, text=text or task.fields["text"])

        yield Watcher(stage, tick)
