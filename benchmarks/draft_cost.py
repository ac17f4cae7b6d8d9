"""What a token of each self-draft costs over a plain step of its target: Llama shapes, random weights, one sequence.

Interleaves all passes in one process and prints medians and the tenth percentile. With `--threads 1` it counts the
thread's processor time, which other programs on the machine disturb less.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foredraft.models.base import SkipSet
from foredraft.models.decoder import Decoder
from foredraft.models.rows import Span, plan
from foredraft.weights.quantize import Quantizer

SHAPES = {"110M": (768, 2048, 12), "350M": (1024, 2816, 24)}  # hidden size, MLP size, layers; heads of 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONTEXT = 128


def target(shape: str, dtype: torch.dtype) -> Decoder:
    hidden, mlp, layers = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return Decoder(LlamaForCausalLM(config).to(dtype).eval(), consume=True)


def arms(model: Decoder) -> dict[str, tuple[Decoder, int, float]]:
    """By name: a model, the rows of its pass, and the bytes it adds over the target's."""
    half = tuple(range(1, model.num_layers, 2))
    four, eight = Quantizer("int4"), Quantizer("int8-dynamic")
    made = {
        "plain": (model, 4, 0),
        "verify 5": (model, 5, 0),
        "skip half": (model.variant(skip=SkipSet(half, half)), 1, 0),
        "int4": (model.variant(four), 1, four.nbytes),
        "int4 + skip half": (model.variant(four, SkipSet(half, half)), 1, 0),
        "int8": (model.variant(eight), 1, eight.nbytes),
    }
    return {name: (m, rows, added / model.weight_bytes) for name, (m, rows, added) in made.items()}


def measure(
    passes: dict[str, Callable[[], object]], clock: Callable[[], float], seconds: float
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in passes}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["plain"]) < 12:
        for name, run in passes.items():
            began = clock()
            run()
            times[name].append(clock() - began)
    return {name: sorted(found[2:]) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="110M")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = target(options.shape, DTYPES[options.dtype])
    multiple = 128 if options.dtype == "bf16" else 512
    model.forward(plan([Span(0, 0, list(range(CONTEXT)), 1)], 4, multiple))
    made = arms(model)
    passes = {
        name: lambda m=m, rows=rows: m.forward(
            plan([Span(0, CONTEXT, [5] * rows, rows)], rows, multiple if rows > 1 else 128)
        )
        for name, (m, rows, _) in made.items()
    }
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    times = measure(passes, clock, options.seconds)
    middle = statistics.median(times["plain"])
    print(f"{options.shape} {options.dtype}, {options.threads} threads, context {CONTEXT}, n={len(times['plain'])}")
    print(f"{'pass':18}{'median ms':>10}{'ratio':>8}{'p10 ms':>9}{'bytes added':>13}")
    for name, found in times.items():
        median, low = statistics.median(found), found[len(found) // 10]
        print(f"{name:18}{median * 1e3:10.2f}{median / middle:8.3f}{low * 1e3:9.2f}{made[name][2]:13.3f}")


if __name__ == "__main__":
    main()
