"""A target as it is, in eight and in four bits, on the native runtime: loading, passes, plain decoding and drafting.

For each format: seconds to load, MiB of weights, milliseconds of a pass of 1, 5 and 8 rows after 256 tokens, and tokens
a second of the prompts of demo.py, plain, with the bundled draft and with a copy of the target in four bits. Every text
is equal within a format. `--target` takes a folder that widen.py wrote.
"""

from pathlib import Path

import torch
from _timing import Arm, interleave, parser, report, seconds, summary
from native import pass_ms, tokens_per_second
from transformers.utils.logging import disable_progress_bar

from foredraft import LLM
from foredraft.llm import BUNDLED

FORMATS = (None, "int8", "int4")


def measured(target: Path, weight_format: str | None, rounds: int) -> dict[str, object]:
    made: list[LLM] = []

    def load(draft: str) -> None:
        made.append(LLM(target, draft, weight_format=weight_format, runtime="native", prefix_cache=False))

    loading = [seconds(lambda draft=draft: load(draft)) for draft in (str(BUNDLED / "draft"), "int4")]
    llm, own = made
    texts: dict[str, list[list[int]]] = {}
    arms: dict[str, Arm] = {f"{width} rows, ms": lambda w=width: pass_ms(llm.model, 1, w) for width in (1, 5, 8)}
    speeds = {"plain": (llm, 0), "bundled draft": (llm, None), "int4 copy": (own, None)}
    for name, (one, length) in speeds.items():
        arms[f"{name}, tokens/s"] = lambda o=one, n=length, a=name: tokens_per_second(o, n, texts, a)
    figures = interleave(arms, rounds)
    assert len(set(map(str, texts.values()))) == 1, "a text changed"
    return {name: summary(values) for name, values in figures.items()} | {
        "weights, MiB": llm.model.weight_bytes / 2**20,
        "loading, with the draft / with the copy, s": loading,
    }


def main() -> None:
    flags = parser(__doc__, rounds=2)
    flags.add_argument("--target", type=Path, default=BUNDLED / "target")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    report("quantised", {name or "as it is": measured(args.target, name, args.rounds) for name in FORMATS}, args.out)


if __name__ == "__main__":
    main()
