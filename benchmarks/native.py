"""The native runtime beside the torch runtime on the bundled pair: passes, decoding, prefill, loading.

1. Milliseconds of one pass of target and draft over 1, 4, 5 and 8 rows, and over 4 texts of 5 rows, after 256 tokens.
2. Tokens a second, plain and drafting, of the prompts of demo.py; every text equal within a runtime.
3. Milliseconds of 250 rows of a prompt. 4. Seconds to load.
"""

from collections.abc import Callable
from time import perf_counter

import torch
from _timing import interleave, median_ms, paired_ratio, parser, report, seconds, summary
from demo import OPENINGS
from transformers.utils.logging import disable_progress_bar

from foredraft import LLM, SamplingParams
from foredraft.llm import BUNDLED
from foredraft.models.base import CausalModel
from foredraft.models.rows import Span, plan

RUNTIMES = ("torch", "native")
CONTEXT = 256
PASSES = {"1": (1, 1), "4": (1, 4), "5": (1, 5), "8": (1, 8), "4x5": (4, 5)}  # texts, rows of each


def one_pass(
    model: CausalModel, texts: int, width: int, start: int = CONTEXT, wanted: int = 1
) -> Callable[[], torch.Tensor]:
    """A pass over `width` rows of each text, with the logits of the last `wanted`."""
    shape = model.row_invariance
    spans = [Span(slot, start, list(range(1, width + 1)), wanted) for slot in range(texts)]
    rows = plan(spans, shape.min_rows, shape.key_multiple, shape.row_multiple)
    return lambda: model.forward(rows)


def pass_ms(model: CausalModel, texts: int, width: int, start: int = CONTEXT, repeats: int = 20) -> float:
    """Milliseconds of one pass, the median of some."""
    return median_ms(one_pass(model, texts, width, start), repeats)


def tokens_per_second(llm: LLM, num_draft_tokens: int | None, texts: dict[str, list[list[int]]], arm: str) -> float:
    params = SamplingParams(max_new_tokens=128, ignore_eos=True)
    began = perf_counter()
    results = [llm.generate(f"User: {o}\nAssistant:", params, num_draft_tokens=num_draft_tokens) for o in OPENINGS]
    taken = perf_counter() - began
    texts[arm] = [result.token_ids for result in results]
    return sum(map(len, texts[arm])) / taken


def pair(runtime: str) -> LLM:
    return LLM(draft=str(BUNDLED / "draft"), runtime=runtime, prefix_cache=False)


def main() -> None:
    args = parser(__doc__, rounds=3).parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    loads = {runtime: [] for runtime in RUNTIMES}
    llms: dict[str, LLM] = {}
    for runtime in RUNTIMES * 2:
        loads[runtime].append(seconds(lambda runtime=runtime: llms.update({runtime: pair(runtime)})))
    texts: dict[str, list[list[int]]] = {}
    arms = {}
    for runtime, llm in llms.items():
        for role, model in (("target", llm.model), ("draft", llm.drafter.model)):  # type: ignore[attr-defined]
            for name, (count, width) in PASSES.items():
                arms[f"{runtime}, {role}, {name} rows, ms"] = lambda m=model, c=count, w=width: pass_ms(m, c, w)
        arms[f"{runtime}, target, prefill of 250 rows, ms"] = lambda m=llm.model: pass_ms(m, 1, 250, 0, 5)
        for name, length in (("plain", 0), ("drafting", None)):
            arm = f"{runtime}, {name}, tokens/s"
            arms[arm] = lambda a=arm, one=llm, n=length: tokens_per_second(one, n, texts, a)
    figures = interleave(arms, args.rounds)
    results = {name: summary(values) for name, values in figures.items()}
    for name in list(arms):
        if name.startswith("native, "):
            other = name.replace("native, ", "torch, ")
            compared = (name, other) if name.endswith("tokens/s") else (other, name)
            results[name] |= {"times_as_fast": paired_ratio(figures, *compared)["median"]}
    results |= {f"{runtime}, load, s": summary(values) for runtime, values in loads.items()}
    for runtime in RUNTIMES:
        assert texts[f"{runtime}, plain, tokens/s"] == texts[f"{runtime}, drafting, tokens/s"], "a text changed"
    report("native", results, args.out)


if __name__ == "__main__":
    main()
