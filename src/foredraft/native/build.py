"""Compiles the native library: `python src/foredraft/native/build.py [--sanitize NAME] [--out FOLDER]`.

Stands alone, so that the build hook can load it where foredraft cannot be imported. The kernels are compiled once for
each instruction set; which of them runs is chosen at load.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "_foredraft_native.so"
COMMON = ("isa.c", "threads.c", "pass.c", "chain.c", "choose.c", "pack.c")
KERNELS = ("kernels.c", "encode.c", "linear.c", "attention.c", "draw.c", "mask.c", "round.c")
AVX512 = ("-mavx2", "-mfma", *(f"-mavx512{name}" for name in ("f", "bw", "vl", "dq", "vnni")))
X86_SETS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": AVX512,
    "avx512_bf16": (*AVX512, "-mavx512bf16"),
    "amx": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread")
WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi")


class BuildError(Exception):
    """The library cannot be built here; says why."""


def compiler() -> list[str] | None:
    """$CC, the system's compiler, or ziglang's; None where there is none."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    return [sys.executable, "-m", "ziglang", "cc"] if find_spec("ziglang") else None


def supported() -> bool:
    """Whether this system can have the library at all."""
    return sys.platform in ("linux", "darwin") and sys.maxsize > 2**32


def instruction_sets(machine: str) -> dict[str, tuple[str, ...]]:
    return X86_SETS if machine.lower() in ("x86_64", "amd64") else {"portable": ()}


def build(folder: Path, sanitize: str = "", command: Sequence[str] | None = None, machine: str = "") -> Path:
    """The library in `folder`. `command` and `machine` are for another compiler or target than this system's.

    Raises:
        BuildError: no compiler, or one that fails.
    """
    command = command or compiler()
    if command is None:
        raise BuildError("no C compiler (cc, gcc, clang) and no ziglang package is there")
    if not machine and ("ziglang" in command or Path(command[0]).name == "zig"):
        command = [*command, "-mcpu=baseline"]  # zig's own default is all that this machine has, in every set
    flags = [*FLAGS, *WARNINGS, *((f"-fsanitize={sanitize}", "-g", "-fno-omit-frame-pointer") if sanitize else ())]
    sets = dict(instruction_sets(machine or platform.machine()))
    without: tuple[str, ...] = ()
    if "amx" in sets and not _knows_tiles(command, sets["amx"]):  # gcc 10, clang 10, or an assembler of their time
        del sets["amx"]
        without = ("-DNO_AMX",)
    jobs = [(source, "", without) for source in COMMON]
    jobs += [(source, name, extra) for name, extra in sets.items() for source in KERNELS]
    with tempfile.TemporaryDirectory() as scratch:
        objects = [str(Path(scratch) / f"{Path(source).stem}-{name}.o") for source, name, _ in jobs]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            steps = [
                pool.submit(_run, [*command, *flags, *extra, "-c", str(HERE / source), "-o", made])
                for (source, _, extra), made in zip(jobs, objects, strict=True)
            ]
            for step in steps:
                step.result()
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f"{NAME}.{os.getpid()}"
        _run([*command, *flags, "-shared", *objects, "-o", str(fresh), "-lm"])
        return fresh.replace(folder / NAME)  # at once: another process may be loading the old one


TILES = """#include <immintrin.h>
void probe(void) { _tile_zero(0); _tile_dpbf16ps(0, 1, 2); _tile_dpbsud(0, 1, 2); _tile_release(); }
"""


def _knows_tiles(command: Sequence[str], extra: Sequence[str]) -> bool:
    """Whether compiler and assembler know the instructions of tile registers."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "probe.c"
        source.write_text(TILES, encoding="utf-8")
        return not _result([*command, *extra, "-c", str(source), "-o", str(source.with_suffix(".o"))]).returncode


def _result(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run ({error})") from error


def _run(command: Sequence[str]) -> None:
    done = _result(command)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
    if done.stderr:
        sys.stderr.write(done.stderr)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--sanitize", default="", help="address, undefined or thread")
    flags.add_argument("--out", type=Path, default=HERE)
    args = flags.parse_args()
    try:
        print(build(args.out, args.sanitize))
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
