"""Passes of the native library under a compiler's sanitizers: `make sanitize`, or this with their names.

Builds the library anew into a folder of its own, and runs a small model of every format, on every instruction set, over
rows, mates and threads. A finding ends the run with the sanitizer's report.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from cross_native import logits, program

from foredraft.native import build

RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so"}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "sanitizers", nargs="*", default=["address", "undefined", "thread"], metavar="{address,undefined,thread}"
    )
    flags.add_argument("--library", type=Path, help=argparse.SUPPRESS)  # of the process that is watched
    args = flags.parse_args()
    if args.library:
        work(args.library)
        return
    for name in args.sanitizers:
        print(f"{name}: ", end="", flush=True)
        with TemporaryDirectory() as folder:
            if name == "thread":
                alone(Path(folder))
            else:
                watched(name, build.build(Path(folder), name))


def alone(folder: Path) -> None:
    """Passes on one to three threads, and of two callers at once, in a program that has no Python around it."""
    steady = ["setarch", "-R"] if shutil.which("setarch") else []  # it takes no layout of memory but the usual one
    print(f"{len(logits([*steady, str(program(folder, 'thread'))]))} models, nothing found")


def watched(name: str, library: Path) -> None:
    """The work below in a process that has the sanitizer's own library first."""
    command = build.compiler() or ["cc"]
    found = subprocess.run([*command, f"-print-file-name={RUNTIMES[name]}"], capture_output=True, text=True, check=True)
    options = {f"{short}_OPTIONS": "detect_leaks=0:halt_on_error=1" for short in ("ASAN", "UBSAN")}
    environment = os.environ | options | {"LD_PRELOAD": found.stdout.strip()}
    done = subprocess.run([sys.executable, __file__, "--library", str(library)], env=environment)
    if done.returncode:
        sys.exit(f"{name}: a finding, or the run failed (exit {done.returncode})")


def work(path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from foredraft.models.base import Guessing
    from foredraft.models.native import NativeModel
    from foredraft.models.rows import Span, plan
    from foredraft.native.choosing import Sampler
    from foredraft.native.library import load
    from foredraft.policy import StopRule
    from foredraft.weights.quantize import Quantizer

    sizes = {"hidden_size": 44, "intermediate_size": 90, "num_hidden_layers": 2, "vocab_size": 157, "head_dim": 22}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    passes = 0
    for dtype in (torch.float32, torch.bfloat16):
        model = LlamaForCausalLM(config).to(dtype).eval()
        for isa in load(path).isas:
            target = NativeModel(model, load(path), isa=isa)
            for runs in (target, target.variant(Quantizer("int4")), target.variant(Quantizer("int8-dynamic"))):
                for threads, width in ((1, 1), (2, 17), (3, 130)):
                    torch.set_num_threads(threads)
                    tokens = list(range(width))
                    runs.forward(plan([Span(0, 0, tokens, 1), Span(2, 5, tokens, width)], 1, 1))
                    guessing = [Guessing(sampler, 1, 9) for sampler in (Sampler(), Sampler(0.7, 20, 0.8, 0.01))]
                    rule = StopRule([None, 0.9], [0.9, 0.8], [0.1] * 9, [0.0] * 9, 1)
                    runs.chain([Span(0, width, [1]), Span(1, 0, tokens[:3])], guessing, rule, 150)
                    passes += 1
                target.cache.release()
    print(f"{passes} passes and chains, nothing found")


if __name__ == "__main__":
    main()
