"""Make what the peers need under runs/peers: an environment for each engine, and the models in its format.

    python benchmarks/peers/prepare.py [--target FOLDER --draft FOLDER --name bundled]

llama.cpp comes as `xllamacpp` (its wheel has AVX2 kernels), OpenVINO GenAI as `openvino-genai`; models for it are
exported by optimum-intel, which wants an older transformers and no torchvision, so in a third environment.
"""

import argparse
import subprocess
import sys
from pathlib import Path

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


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--target", type=Path, default=BUNDLED / "target")
    flags.add_argument("--draft", type=Path, default=BUNDLED / "draft")
    flags.add_argument("--name", default="bundled", help="of the folder that the models go to")
    args = flags.parse_args()
    for name, packages in PACKAGES.items():
        if not python(name).exists():
            environment(name, packages)
    for role, source in (("target", args.target), ("draft", args.draft)):
        export(source, RUNS / "models" / args.name, role)


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
