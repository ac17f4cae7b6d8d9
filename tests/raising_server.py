"""`foredraft serve` with a target whose pass raises while a file exists: `python tests/raising_server.py ARGUMENTS`."""

import os
import sys
from pathlib import Path
from typing import Any

from foredraft import cli
from foredraft.server import launching

TRIGGER = Path(os.environ["RAISE_WHILE"])
load = launching.load


def load_raising(spec: Any, room: int | None) -> Any:
    llm = load(spec, room)
    forward = llm.model.forward

    def raising(rows: Any) -> Any:
        if TRIGGER.exists():
            raise RuntimeError("the device is on fire")
        return forward(rows)

    llm.model.forward = raising
    return llm


if __name__ == "__main__":
    launching.load = load_raising
    sys.argv[0] = "foredraft"
    cli.main()
