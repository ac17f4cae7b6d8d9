"""Make what the peers need under runs/peers: an environment for each engine, and the models in its format.

    python benchmarks/peers/prepare.py [--shape 344M | --target FOLDER --draft FOLDER --name NAME]

llama.cpp comes as `xllamacpp` (its wheel has AVX2 kernels), OpenVINO GenAI as `openvino-genai`; models for it are
exported by optimum-intel, which wants an older transformers and no torchvision, so in a third environment. A shape is
the bundled target widened by benchmarks/widen.py, with the bundled draft.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from widen import SHAPES, widen

from foredraft.llm import BUNDLED

HERE = Path(__file__).resolve().parent
RUNS = HERE.parents[1] / "runs" / "peers"
PACKAGES = {
    "llama_cpp": ["xllamacpp", "gguf", "numpy"],
    "openvino_genai": ["openvino-genai", "numpy"],
    "export": ["torch==2.13.0", "optimum-intel[openvino]", "openvino-tokenizers"],
}


def python(name: str) -> Path:
    return RUNS / name / "bin" / "python"


class Pair(NamedTuple):
    """A target and a draft, and the folder under runs/peers/models that has them in the engines' formats."""

    target: Path
    draft: Path
    name: str


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--shape", choices=SHAPES, help="the bundled target, widened to so many parameters")
    flags.add_argument("--target", type=Path)
    flags.add_argument("--draft", type=Path, default=BUNDLED / "draft")
    flags.add_argument("--name", help="of the folder that the models go to; default: the shape, or bundled")


def pair(args: argparse.Namespace) -> Pair:
    """What the flags name. Ends the program where they contradict each other."""
    if args.shape and args.target:
        sys.exit(f"--shape {args.shape} contradicts --target {args.target}; give one of them")
    name = args.name or args.shape or "bundled"
    made = RUNS / "models" / name / "target" if args.shape else BUNDLED / "target"
    return Pair(args.target or made, args.draft, name)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(flags)
    args = flags.parse_args()
    models = pair(args)
    for name, packages in PACKAGES.items():
        if not python(name).exists():
            environment(name, packages)
    if args.shape and not models.target.exists():
        widen(BUNDLED / "target", models.target, SHAPES[args.shape], torch.bfloat16)
    for role, source in (("target", models.target), ("draft", models.draft)):
        export(source, RUNS / "models" / models.name, role)


def environment(name: str, packages: list[str]) -> None:
    print(f"making the environment {name}", flush=True)
    run(sys.executable, "-m", "venv", RUNS / name)
    run(python(name), "-m", "pip", "install", "--quiet", *packages)
    if name == "export":
        run(python(name), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision")


def export(source: Path, out: Path, role: str) -> None:
    print(f"exporting {source} to {out}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    run(python("llama_cpp"), HERE / "to_gguf.py", source, out / f"{role}.gguf")
    options = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
    tool = RUNS / "export" / "bin" / "optimum-cli"
    run(tool, "export", "openvino", "--model", source, *options, out / f"{role}-openvino", quiet=True)


def run(*command: object, quiet: bool = False) -> None:
    output = subprocess.DEVNULL if quiet else None
    subprocess.run([str(part) for part in command], check=True, stdout=output, stderr=output)


if __name__ == "__main__":
    main()
