"""Passes of the native library alone, by shape, weight format and instruction set, over texts x rows x context.

For each: milliseconds (medians, arms in turn), rows a second, GFLOP/s, GB of weights a second, and the share of what a
linear layer alone reaches. The rate is 2 x the weights of all linear layers x rows / seconds: attention takes time and
counts for nothing. Logits are wanted of all rows, as where a draft is checked; of a text of more than 64 rows, which is
a prompt, of the last one. The layer alone has its weights in the caches; of some sizes and rows the best counts.

    python benchmarks/native_passes.py --shapes target 110M --isas avx512 amx --formats bf16 --points 1x1 8x4 1x256@0

A point is TEXTSxROWS, after 200 tokens of each text, or TEXTSxROWS@TOKENS. Weights are random. With several `--library`
(files that `make native` wrote from different sources) these take turns too.
"""

import ctypes
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from _timing import Arm, interleave, median_ms, parser, report, summary
from native import one_pass
from native_110m import CONFIG, random_llama
from transformers import LlamaConfig
from widen import SHAPES, widened_config

from foredraft.llm import BUNDLED
from foredraft.models.native import NativeModel
from foredraft.native.library import ISAS, Library, load
from foredraft.weights.memory import WeightMemory
from foredraft.weights.packed import Packed, Part, pack, quantized, stacked
from foredraft.weights.quantize import Quantizer

FORMATS = ("bf16", "int8", "int4")
POINTS = ("1x1", "1x8", "4x1", "8x1", "8x4", "4x8", "1x256@0")
CONTEXT = 200
MOST_CHECKED = 64  # rows of a text; one that has more is a prompt
SECONDS = 0.1  # of one arm's turn: slow passes are repeated less often
LINEARS = ((1024, 1024), (4096, 256))  # outputs, inputs: a layer alone, of 1M weights
LINEAR_ROWS = (6, 8, 64, 256)


@dataclass(frozen=True, slots=True)
class Point:
    """What a pass is over."""

    texts: int
    rows: int
    context: int = CONTEXT

    def __str__(self) -> str:
        return f"{self.texts}x{self.rows}@{self.context}"

    @property
    def wanted(self) -> int:
        """Rows of each text whose logits are computed."""
        return self.rows if self.rows <= MOST_CHECKED else 1


def point(text: str) -> Point:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:@(\d+))?", text)
    if found is None:
        raise ArgumentTypeError(f"{text!r} is no point; write TEXTSxROWS or TEXTSxROWS@TOKENS, as 8x4 or 1x256@0")
    return Point(*(int(number) for number in found.groups() if number is not None))


def configs() -> dict[str, LlamaConfig]:
    target, draft = (LlamaConfig.from_pretrained(BUNDLED / role) for role in ("target", "draft"))
    return {"target": target, "draft": draft, "110M": CONFIG, "344M": widened_config(target, SHAPES["344M"])}


def add_flags(flags: ArgumentParser) -> None:
    flags.add_argument("--shapes", nargs="+", choices=configs(), default=["target", "draft"])
    flags.add_argument("--isas", nargs="+", choices=ISAS, help="instruction sets; default: all that are here")
    flags.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="of the weights")
    flags.add_argument("--points", nargs="+", type=point, default=[point(text) for text in POINTS])
    flags.add_argument("--library", type=Path, action="append", help="a library file; default: the one that was built")


# --- passes ----------------------------------------------------------------------------------------------------------


def model_in(model: NativeModel, form: str) -> NativeModel:
    return model if form == "bf16" else model.variant(Quantizer(form))  # type: ignore[arg-type]


def model_with(model: NativeModel, isa: str) -> NativeModel:
    """The same weights and cache by another instruction set."""
    other = model.variant()
    other.isa = model.library.isa(isa)
    other.call = other.prepared()
    return other


def pass_arm(model: NativeModel, at: Point) -> Arm:
    return lambda: median_ms(one_pass(model, at.texts, at.rows, at.context, at.wanted), at_most=SECONDS)


def rates(model: NativeModel, at: Point, ms: float) -> dict[str, float]:
    """What a pass that takes so long makes of its rows and weights."""
    rows = at.texts * at.rows
    head, *layers = model.products
    work = 2 * (sum(map(size, layers)) * rows + size(head) * at.texts * at.wanted)
    return {
        "rows_per_s": 1e3 * rows / ms,
        "gflops": work / ms / 1e6,
        "weights_gb_per_s": sum(packed.nbytes for packed in model.products) / ms / 1e6,
    }


def size(packed: Packed) -> int:
    return packed.outputs * packed.inputs


# --- a linear layer alone --------------------------------------------------------------------------------------------


def linear(library: Library, form: str, outputs: int, inputs: int) -> Packed:
    memory = WeightMemory()
    plain = pack(library, stacked([Part(torch.randn(outputs, inputs).bfloat16())]), inputs, memory)
    return plain if form == "bf16" else quantized(library, plain, Quantizer(form), memory)  # type: ignore[arg-type]


def linear_call(library: Library, isa: str, layer: Packed, rows: int) -> Callable[[], int]:
    x, y, struct = torch.randn(rows, layer.inputs), torch.empty(rows, layer.outputs), layer.struct()
    number, threads = library.isa(isa), torch.get_num_threads()
    return lambda: library.functions.foredraft_linear(
        ctypes.addressof(struct), number, x.data_ptr(), rows, layer.inputs, y.data_ptr(), layer.outputs, threads
    )


def linear_arms(library: Library, isa: str, form: str) -> dict[str, tuple[Arm, int]]:
    """With the operations of each."""
    arms: dict[str, tuple[Arm, int]] = {}
    for outputs, inputs in LINEARS:
        layer = linear(library, form, outputs, inputs)
        for rows in LINEAR_ROWS:
            arm = partial(median_ms, linear_call(library, isa, layer, rows), 100, SECONDS)
            arms[f"{rows} rows by {outputs}x{inputs}"] = arm, 2 * outputs * inputs * rows
    return arms


def best(works: dict[str, int], times: dict[str, dict[str, float]]) -> dict[str, object]:
    """The best rate of a layer alone, and where it was; `works`: the operations of each arm."""
    made = {name: work / times[name]["median"] / 1e6 for name, work in works.items()}
    found = max(made, key=made.__getitem__)
    return {"gflops": made[found], "of": found.rpartition(", ")[2], "ms": times[found]}


# --- all together ----------------------------------------------------------------------------------------------------


def built(paths: list[Path] | None) -> dict[str, Library]:
    """The libraries that take turns, by what their arms' names begin with."""
    if not paths:
        return {"": load()}
    return {f"{path}, " if len(paths) > 1 else "": load(path.resolve()) for path in paths}


def models(library: Library, args: Namespace) -> Iterator[tuple[str, str, NativeModel]]:
    """Each with its shape's name and the name of its format and instruction set."""
    for shape in args.shapes:
        plain = NativeModel(random_llama(configs()[shape]), library, consume=True)
        for form in args.formats:
            model = model_in(plain, form)
            for isa in args.isas or library.isas:
                yield shape, f"{form}, {isa}", model_with(model, isa)


def measured(args: Namespace) -> dict[str, dict[str, dict[str, object]]]:
    arms: dict[str, Arm] = {}
    alone: dict[str, dict[str, int]] = {}  # by format and instruction set: the operations of a layer's arms
    passes: dict[str, tuple[str, NativeModel, Point]] = {}
    for build, library in built(args.library).items():
        for form, isa in product(args.formats, args.isas or library.isas):
            made = {f"{build}{form}, {isa}, {of}": arm for of, arm in linear_arms(library, isa, form).items()}
            alone[f"{build}{form}, {isa}"] = {name: work for name, (_, work) in made.items()}
            arms |= {name: arm for name, (arm, _) in made.items()}
        for shape, kind, model in models(library, args):
            for at in args.points:
                passes[f"{build}{shape}, {kind}, {at}"] = build + kind, model, at
                arms[f"{build}{shape}, {kind}, {at}"] = pass_arm(model, at)
    times = {name: summary(values) for name, values in interleave(arms, args.rounds).items()}
    ceilings = {kind: best(works, times) for kind, works in alone.items()}
    results: dict[str, dict[str, object]] = {}
    for name, (kind, model, at) in passes.items():
        found = rates(model, at, times[name]["median"])
        results[name] = {"ms": times[name], **found, "of_layer_alone": found["gflops"] / ceilings[kind]["gflops"]}
    return {"a linear layer alone": ceilings, "passes": results}


def main() -> None:
    flags = parser(__doc__, rounds=3)
    add_flags(flags)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    report("native_passes", measured(args), args.out)


if __name__ == "__main__":
    main()
