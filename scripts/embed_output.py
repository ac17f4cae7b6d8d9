"""Renew what commands print in the documentation: `python scripts/embed_output.py docs/doctor.md`.

A block that begins with ```console holds a line `$ command`; what stands below it becomes what the command prints now.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"(```console\n\$ (.*)\n).*?(```)", re.DOTALL)


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        path.write_text(BLOCK.sub(renewed, path.read_text(encoding="utf-8")), encoding="utf-8")


def renewed(block: re.Match[str]) -> str:
    beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {"PATH": beside, "COLUMNS": "80"}
    done = subprocess.run(block[2], shell=True, capture_output=True, text=True, env=environment)
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return block[1] + "\n".join(lines) + "\n" + block[3]


if __name__ == "__main__":
    main()
