"""Files that a command writes: refused before it runs where they cannot be written, and written whole or not at all."""

import os
import tempfile
from pathlib import Path

from foredraft.errors import ForedraftError


def check_writable(path: Path) -> None:
    """Raises ForedraftError where a file cannot be written; leaves nothing behind."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.expanduser().parent, prefix=f".{path.name}"):
            pass
    except OSError as error:
        raise ForedraftError(f"{path} cannot be written: {error.strerror}; nothing was run") from error
    if path.expanduser().is_dir():
        raise ForedraftError(f"{path} cannot be written: it is a folder; nothing was run")


def write_whole(text: str, path: Path) -> None:
    """Whole or not at all. Raises ForedraftError where it cannot be."""
    path = path.expanduser()
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ForedraftError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
