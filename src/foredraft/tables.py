"""Tables for a terminal, in which no word is cut."""

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDEST = 10_000  # columns: to measure what a table needs


def narrow_table(*headings: str) -> Table:
    """Without lines between columns; headings may take several lines."""
    return Table(*headings, box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)


def show_whole(table: Table, console: Console) -> None:
    """Print it; a table that needs more room than there is takes it."""
    least = Measurement.get(console, console.options.update(max_width=WIDEST), table).minimum
    table.width = least if least > console.width else None
    console.print(table, crop=False)
