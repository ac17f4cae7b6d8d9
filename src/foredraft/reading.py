"""Text files that users name."""

from pathlib import Path


def read_up_to(path: Path, most: int) -> str | None:
    """A file's text, UTF-8 with or without a byte order mark; None where it has more bytes: a device may never end.

    Raises:
        OSError, ValueError: it cannot be opened, or is no such text.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    return None if len(content) > most else content.decode("utf-8-sig")
