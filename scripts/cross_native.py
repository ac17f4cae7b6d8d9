"""The native library on another processor: `make cross`, or this with `--run "qemu-aarch64"`.

Cross-compiles `native_check.c` and the library into one static program with PyPI's ziglang, runs it by a command that
can (qemu-user's is looked for; without one it is only compiled), and compares its logits with this machine's.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from foredraft.native import build

CHECK = Path(__file__).with_name("native_check.c")
TOLERANCE = {"0": 1e-3, "1": 5e-3, "2": 0.1, "3": 0.1}  # by format: codes of inputs are rounded to either side


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--target", default="aarch64-linux-musl", help="as zig names it")
    flags.add_argument("--zig", default=f"{sys.executable} -m ziglang", help="the command")
    flags.add_argument("--run", help="the command that runs a program of the target; its name is appended")
    flags.add_argument("--threads", type=int, default=3, help="at most; 1 for an emulator that has no threads")
    args = flags.parse_args()
    run = args.run or shutil.which(f"qemu-{args.target.partition('-')[0]}")
    with TemporaryDirectory() as folder:
        made = static_program(Path(folder) / "check", [*shlex.split(args.zig), "cc", "-target", args.target])
        print(f"{args.target}: compiled")
        if not run:
            sys.exit("nothing here runs it: install qemu-user, or name a command by --run")
        theirs = logits([*shlex.split(run), str(made), str(args.threads)])
        mine = logits([str(program(Path(folder))), str(args.threads)])
    compare({name: mine[name] for name in theirs}, theirs)
    print(f"{args.target}: {len(theirs)} formats, rows bit-equal alone, together and beside others, as here")


def static_program(path: Path, command: Sequence[str]) -> Path:
    """Everything in one, for a processor without instruction sets to choose among."""
    sources = [str(build.HERE / name) for name in (*build.COMMON, *build.KERNELS)]
    flags = [*build.FLAGS, *build.WARNINGS, "-static", f"-I{build.HERE}"]
    subprocess.run([*command, *flags, *sources, str(CHECK), "-o", str(path), "-lm"], check=True)
    return path


def program(folder: Path, sanitize: str = "") -> Path:
    """Around this machine's library, built anew."""
    library = build.build(folder, sanitize)
    flags = [*build.FLAGS, *build.WARNINGS, *([f"-fsanitize={sanitize}", "-g"] if sanitize else ())]
    around = [f"-I{build.HERE}", str(CHECK), str(library), f"-Wl,-rpath,{folder}"]
    made = folder / "native_check"
    subprocess.run([*(build.compiler() or ["cc"]), *flags, *around, "-o", str(made), "-lm"], check=True)
    return made


def logits(command: Sequence[str]) -> dict[tuple[str, str], list[float]]:
    """What the program prints, by instruction set and format; it ends with an error where bits differ."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(isa, form): [float(value) for value in values] for isa, form, *values in lines}


def compare(mine: dict[tuple[str, str], list[float]], theirs: dict[tuple[str, str], list[float]]) -> None:
    for name, values in theirs.items():
        worst = max(abs(a - b) for a, b in zip(mine[name], values, strict=True))
        if worst > TOLERANCE[name[1]]:
            sys.exit(f"{name}: logits differ by {worst}")


if __name__ == "__main__":
    main()
