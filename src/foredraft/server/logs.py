"""One JSON object a line on stderr. Of a request: who, what, how long, how many; never its words, never a key."""

import json
import logging
import sys
import time
import traceback
from typing import Any

LOGGER = "foredraft.server"


class JsonFormatter(logging.Formatter):
    """Level, event and whatever fields came with it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line |= _trace(record.exc_info[1])
        return json.dumps(line, default=str)


def _trace(error: BaseException) -> dict[str, object]:
    """Where it happened; the message only of errors that are not made from what a client sent."""
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    message = {"message": str(error)[:500]} if isinstance(error, RuntimeError | OSError | MemoryError) else {}
    return {"error": type(error).__name__, **message, "frames": frames[-12:]}


def configure(level: str) -> None:
    """Send our lines, and uvicorn's, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in (LOGGER, "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = ([handler] if name != "uvicorn.error" else []), name == "uvicorn.error"
        logger.setLevel(level.upper() if name == LOGGER else logging.WARNING)


def log(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: object) -> None:
    """A line; `error` adds where it happened."""
    info = (type(error), error, error.__traceback__) if error is not None else None
    logging.getLogger(LOGGER).log(level, event, extra={"fields": fields}, exc_info=info)
