"""Write constraints.txt: the exact versions of what this environment holds, without foredraft itself.

Called by `make constraints` in an environment that was made for it. CUDA's libraries are left out (torch names their
versions itself), and so is which build of torch it was.
"""

import re
import subprocess
import sys

from install import CONSTRAINTS, ROOT

HEADER = "# Exact versions for `make demo`, `make test` and `make check`. Made by `make constraints`; do not edit.\n"
LEFT_OUT = re.compile(r"(foredraft|pip|triton)==|nvidia-|cuda-")


def main() -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "list", "--format", "freeze"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    lines = sorted((line.partition("+")[0] for line in listed if not LEFT_OUT.match(line)), key=str.lower)
    (ROOT / CONSTRAINTS).write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
