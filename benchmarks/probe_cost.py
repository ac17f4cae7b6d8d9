"""What the probe of row invariance adds to loading on the torch runtime: the bundled target, Llamas of 110M and 350M.

    python benchmarks/probe_cost.py --rounds 5
    python benchmarks/probe_cost.py --shapes bundled 110M --dtypes bfloat16

Each figure is seconds of one probe; arms take turns, the report is JSON.
"""

import torch
from _timing import interleave, parser, report, seconds, summary
from draft_cost import SHAPES, target

from foredraft.llm import BUNDLED
from foredraft.models.base import CausalModel
from foredraft.models.invariance import probe
from foredraft.models.load import LoadOptions, load_model

DTYPES = ("bfloat16", "float32")


def made(shape: str, dtype: str) -> CausalModel:
    if shape == "bundled":
        return load_model(BUNDLED / "target", LoadOptions(dtype, "cpu", runtime="torch"))
    return target(shape, getattr(torch, dtype))


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--shapes", nargs="+", choices=("bundled", *SHAPES), default=("bundled", "110M"))
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    models = {f"{shape} {dtype}": made(shape, dtype) for shape in args.shapes for dtype in args.dtypes}
    arms = {name: lambda model=model: seconds(lambda: probe(model)) for name, model in models.items()}
    report("probe", {name: summary(found) for name, found in interleave(arms, args.rounds).items()}, args.out)


if __name__ == "__main__":
    main()
