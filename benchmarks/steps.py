"""Where a step's time goes beside its passes: microseconds of Python, by part, on the bundled pair.

`python benchmarks/steps.py [--parts]`: plain greedy, plain sampled, under a JSON schema, and drafting five tokens a
step; one text, and eight at once. A step's microseconds outside the passes are its wall time less that of the library's
passes and chains, the least of the rounds; `--parts` splits them by function (each timer adds some 0.3 us).
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from _timing import parser, report
from transformers.utils.logging import disable_progress_bar

import foredraft.engine as engine_module
from foredraft import LLM, SamplingParams
from foredraft.drafters import forced
from foredraft.llm import BUNDLED
from foredraft.models.calls import Call

PROMPT = "User: I need a table for two in Oakland tonight.\nAssistant:"
TOKENS = 192
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
PASSES = ("pass", "chain")


class Timers:
    """Seconds that each part took itself, without the parts it called."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.inner = [0.0]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            began = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = perf_counter() - began
                self.seconds[name] += taken - self.inner.pop()
                self.inner[-1] += taken

        return wrapper


def parts_of(llm: LLM) -> list[tuple[Any, str]]:
    """What is timed with `--parts`."""
    engine = llm.engine
    own = (
        "step",
        "_admit",
        "_run",
        "_propose",
        "_span",
        "_commit_all",
        "_commit",
        "_verify",
        "_append",
    )
    return [
        *((engine, name) for name in own),
        (engine.scheduler, "next_batch"),
        (engine_module, "plan"), (engine_module, "account"), (engine_module, "teach"),
        (engine.target, "forward"), (engine.target.cache, "publish"),
        (engine.drafter, "propose"), (engine.drafter, "observe"),
        (engine.policy, "observe"), (engine.policy, "observe_times"), (engine.policy, "start"),
        (forced, "lead"), (forced, "count"), (engine.spoilt, "settle"), (engine, "_observe"),
        (llm.runner, "_advance"), (llm.runner, "_step"), (llm.runner, "_take_in"), (llm.runner, "_deliver"),
    ]  # fmt: skip


def calls(llm: LLM) -> list[tuple[Call, str, str]]:
    """The library's passes, of the target and of a draft model."""
    models = [llm.model, getattr(llm.drafter, "model", llm.model)]
    found = {id(model.call): model.call for model in models}
    return [
        (call, *pair) for call in found.values() for pair in (("function", "pass"), ("function_of_chains", "chain"))
    ]


def measure(
    llm: LLM, prompts: list[str], params: SamplingParams, length: int | None, *, parts: bool
) -> dict[str, float]:
    """Microseconds a step: `all`, `outside` the passes, each part; and tokens a step."""
    timers = Timers()
    with ExitStack() as stack:
        for call, attribute, name in calls(llm):
            stack.enter_context(patch.object(call, attribute, timers.timed(name, getattr(call, attribute))))
        for owner, attribute in parts_of(llm) if parts else ():
            stack.enter_context(patch.object(owner, attribute, timers.timed(attribute, getattr(owner, attribute))))
        steps = [0]
        step = llm.engine.step

        def counted() -> Any:
            steps[0] += 1
            return step()

        stack.enter_context(patch.object(llm.engine, "step", counted))
        began = perf_counter()
        results = llm.generate(prompts, params, num_draft_tokens=length)
        wall = perf_counter() - began
    tokens = sum(len(result.token_ids) for result in results)
    passes = sum(timers.seconds[name] for name in PASSES)
    each = 1e6 / steps[0]
    found = {"tokens": tokens / steps[0], "all": wall * each, "outside": (wall - passes) * each}
    return found | {name: seconds * each for name, seconds in timers.seconds.items()}


def main() -> None:
    made = parser(__doc__, rounds=9)
    made.add_argument("--parts", action="store_true", help="time each part")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    llm = LLM(draft=str(BUNDLED / "draft"), max_batch_size=8, prefix_cache=False)
    free, form = (
        SamplingParams(max_new_tokens=TOKENS, ignore_eos=True),
        SamplingParams(max_new_tokens=TOKENS, structured=SCHEMA),
    )
    drawn = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True, temperature=0.8, seed=1)
    arms = {"plain": (free, 0), "sampled": (drawn, 0), "structured": (form, 0), "drafting": (free, 5),
            "drafting, sampled": (drawn, 5), "structured, drafting": (form, 5)}  # fmt: skip
    results: dict[str, dict[str, float]] = {}
    for count in (1, 8):
        prompts = [PROMPT] * count
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        for round_ in range(args.rounds + 1):
            for name, (params, length) in arms.items():
                found = measure(llm, prompts, params, length, parts=args.parts)
                if round_:
                    figures[name].append(found)
        for name, rounds in figures.items():
            keys = {key for found in rounds for key in found}
            least = {key: min(found.get(key, 0.0) for found in rounds) for key in keys}
            results[f"{name}, {count}"] = dict(sorted(least.items(), key=lambda item: -item[1]))
    for name, found in results.items():
        print(f"{name:24} " + "  ".join(f"{key} {value:.4g}" for key, value in found.items()))
    if args.out:
        report("steps", results, args.out)


if __name__ == "__main__":
    main()
