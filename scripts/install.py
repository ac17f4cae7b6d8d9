"""Install foredraft into the environment whose Python runs this: `python scripts/install.py pinned --extras dev`.

pinned   the exact versions of constraints.txt
lowest   the lowest version of each dependency that pyproject.toml allows
latest   the newest that it allows

PyPI's torch for Linux is a CUDA build of gigabytes. Unless `--torch any` is given, a CPU build is looked for first:
where pip is set up to look, then in PyTorch's own index. Where neither has one, pip's choice it is, and this says so.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = "constraints.txt"
CPU_INDEX = ("--index-url", "https://download.pytorch.org/whl/cpu", "--retries", "0", "--timeout", "10")
REQUIREMENT = re.compile(r"(?P<name>[\w-]+)(?P<range>[^;#\[\]]*)$")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("versions", choices=("pinned", "lowest", "latest"))
    flags.add_argument("--extras", default="", help="optional dependencies of foredraft, separated by commas")
    flags.add_argument("--also", nargs="*", default=[], help="other requirements, such as pytest")
    flags.add_argument("--torch", choices=("cpu", "any"), default="cpu", help="which build; any: as pip chooses")
    args = flags.parse_args()
    os.chdir(ROOT)  # so that the environment's paths, which pip splits at spaces, can be relative
    if args.torch == "cpu" and sys.platform == "linux":
        install_cpu_torch(args.versions)
    itself = f".[{args.extras}]" if args.extras else "."
    pip("install", *rules(args.versions), "--editable", itself, *args.also, env=pins(args.versions))


def install_cpu_torch(versions: str) -> None:
    """torch alone, as a CPU build if there is one; its needs come with the others'."""
    if versions == "pinned" and installed_torch().partition("+")[0] == pinned()["torch"]:
        return
    found = cpu_torch(wanted(versions), newest=versions != "lowest")
    if found:
        pip("install", "--no-deps", *found)
    else:
        print("no CPU build of torch is to be had here; taking pip's choice, which is gigabytes", flush=True)


def cpu_torch(allowed: Callable[[str], bool], *, newest: bool) -> list[str]:
    """pip's arguments for the newest or oldest CPU build that is allowed; empty where none is offered."""
    for place in ((), CPU_INDEX):
        found = sorted((v for v in offered(place) if v.endswith("+cpu") and allowed(v)), key=release)
        if found:
            return [*place, f"torch=={found[-1 if newest else 0]}"]
    return []


def offered(place: tuple[str, ...]) -> list[str]:
    """The releases of torch that pip sees; none where it does not get there."""
    command = [sys.executable, "-m", "pip", "index", "versions", "torch", *place]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    line = re.search(r"Available versions: (.*)", listed)
    return line[1].split(", ") if line else []


def wanted(versions: str) -> Callable[[str], bool]:
    """Which releases of torch will do."""
    if versions == "pinned":
        exact = pinned()["torch"]
        return lambda version: version.partition("+")[0] == exact
    least, most = (re.search(rf"{sign}\s*([\d.]+)", dependencies()["torch"]) for sign in (">=", "<"))
    assert least and most, "pyproject.toml gives torch no range such as >=2.11,<2.16"
    return lambda version: release(least[1]) <= release(version) < release(most[1])


def rules(versions: str) -> list[str]:
    """What pip is told about versions, beside the ranges of pyproject.toml."""
    torch = installed_torch()
    held = [f"torch=={torch}"] if torch.endswith("+cpu") else []
    if versions == "latest":
        return ["--upgrade", "--upgrade-strategy", "eager", *held]
    if versions == "lowest":
        lowest = {name: range.partition(",")[0].replace(">=", "==") for name, range in dependencies().items()}
        return held + [name + exact for name, exact in lowest.items() if not (held and name == "torch")]
    return []


def pins(versions: str) -> dict[str, str]:
    """Constraints as pip's environment, which it hands on to the environment that it builds in."""
    return dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), CONSTRAINTS) if versions == "pinned" else {}


def dependencies() -> dict[str, str]:
    """Name to range, of what pyproject.toml says foredraft needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = (REQUIREMENT.match(line) for line in project["dependencies"])
    return {match["name"]: match["range"].strip() for match in found if match}


def pinned() -> dict[str, str]:
    """Name to version, of constraints.txt."""
    lines = (ROOT / CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def installed_torch() -> str:
    """Its version, or nothing. Asked of another process, which sees what was installed a moment ago."""
    code = "from importlib.metadata import distributions as d\nfor x in d(name='torch'): print(x.version)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, env=os.environ | (env or {}))
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
