"""Make what the peers need under runs/peers: an environment for each engine, and the models in its format.

    python benchmarks/peers/prepare.py [--shape 344M | --target FOLDER --draft FOLDER --name NAME] [--quantized]

llama.cpp comes twice: as PyPI's `xllamacpp`, whose wheel has AVX2 kernels, and as npm's `node-llama-cpp`, which brings
libraries with AVX-512 and the sources they were made of; llama_cpp_avx512_job.cpp is compiled against these (npm, git
and g++ have to be there). OpenVINO GenAI is `openvino-genai`; models for it are exported by optimum-intel, which wants
an older transformers and no torchvision, so in an environment of its own. A shape is the bundled target widened by
benchmarks/widen.py, with the bundled draft. `--quantized` writes the target as q8_0 and q4_0 for llama.cpp, too.
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
NODE = ("node-llama-cpp", "3.22.1")
QUANTIZED = {"int8": "Q8_0", "int4": "Q4_0"}  # our weight formats, and what llama.cpp has at about the same size


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
    flags.add_argument("--quantized", action="store_true", help="the target as q8_0 and q4_0 for llama.cpp, too")
    args = flags.parse_args()
    models = pair(args)
    if not (RUNS / "llama_cpp_avx512" / "job").exists():
        avx512()
    for name, packages in PACKAGES.items():
        if not python(name).exists():
            environment(name, packages)
    if args.shape and not models.target.exists():
        widen(BUNDLED / "target", models.target, SHAPES[args.shape], torch.bfloat16)
    for role, source in (("target", models.target), ("draft", models.draft)):
        export(source, RUNS / "models" / models.name, role)
    for kind in QUANTIZED.values() if args.quantized else ():
        gguf(models.target, RUNS / "models" / models.name / f"target-{kind}.gguf", "--quantize", kind)


def environment(name: str, packages: list[str]) -> None:
    print(f"making the environment {name}", flush=True)
    run(sys.executable, "-m", "venv", RUNS / name)
    run(python(name), "-m", "pip", "install", "--quiet", *packages)
    if name == "export":
        run(python(name), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision")


def avx512() -> None:
    """npm's libraries of llama.cpp, and a worker compiled against them and their own sources."""
    print("making llama_cpp_avx512", flush=True)
    folder, (name, version) = RUNS / "llama_cpp_avx512", NODE
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text("{}")
    packages = [f"{name}@{version}", f"@{name}/linux-x64@{version}"]
    run("npm", "install", "--prefix", folder, "--ignore-scripts", "--omit=optional", "--no-audit", *packages)
    package, libraries, sources = avx512_parts()
    if not sources.exists():
        run("git", "clone", "--quiet", package / "llama" / "gitRelease.bundle", sources)
    includes = [f"-I{sources / part}" for part in ("common", "include", "ggml/include", "vendor")]
    wanted = [f"-l:{path.name}" for path in sorted(libraries.glob("lib*.so")) if "-cpu-" not in path.name]
    job, links = HERE / "llama_cpp_avx512_job.cpp", [f"-L{libraries}", *wanted, f"-Wl,-rpath,{libraries}"]
    run("g++", "-O2", "-std=c++17", *includes, job, "-o", folder / "job", *links)


def avx512_parts() -> tuple[Path, Path, Path]:
    """The npm package, the folder of its libraries, and llama.cpp's sources."""
    modules, name = RUNS / "llama_cpp_avx512" / "node_modules", NODE[0]
    return (
        modules / name,
        modules / f"@{name}" / "linux-x64" / "bins" / "linux-x64",
        RUNS / "llama_cpp_avx512" / "llama.cpp",
    )


def gguf(source: Path, out: Path, *options: str) -> None:
    if not out.exists():
        run(python("llama_cpp"), HERE / "to_gguf.py", source, out, *options)


def export(source: Path, out: Path, role: str) -> None:
    print(f"exporting {source} to {out}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    gguf(source, out / f"{role}.gguf")
    options = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
    tool = RUNS / "export" / "bin" / "optimum-cli"
    run(tool, "export", "openvino", "--model", source, *options, out / f"{role}-openvino", quiet=True)


def run(*command: object, quiet: bool = False) -> None:
    output = subprocess.DEVNULL if quiet else None
    subprocess.run([str(part) for part in command], check=True, stdout=output, stderr=output)


if __name__ == "__main__":
    main()
