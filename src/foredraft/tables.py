"""Tables for a terminal, in which no word is cut."""

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDEST = 10_000  # columns: to measure what a table needs


def narrow_table(*headings: str) -> Table:
    """Without lines between columns; headings may take several lines."""
    return Table(*headings, box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)


def show_whole(table: Table, console: Console) -> None:
    """Print it; a table that needs more room than there is takes it."""
    wide = console.options.update(max_width=WIDEST)
    for column in table.columns:
        cells = (column.header, *column.cells)
        column.min_width = max(Measurement.get(console, wide, cell).minimum for cell in cells)
    least = Measurement.get(console, wide, table).minimum
    table.width = least if least > console.width else None
    console.print(table, crop=False)
    console.print()
