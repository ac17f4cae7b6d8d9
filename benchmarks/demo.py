"""The main job, as `make demo` runs it: the bundled pair, plain against speculative, and the tokens compared.

Eight prompts of 128 greedy tokens, batch 1, two threads; the two arms take turns. Fails unless every token is equal.
"""

import statistics
import sys

import torch
from _timing import interleave, paired_ratio, parser, report, summary
from rich.console import Console
from rich.table import Column, Table
from transformers.utils.logging import disable_progress_bar

from foredraft import LLM, GenerationResult, SamplingParams
from foredraft.drafters.several import forget_outputs
from foredraft.tuning.machine import Load, LoadMeter

OPENINGS = (
    "I need a table for two in Oakland tonight.",
    "Can you find me a one way flight from Chicago to Seattle next Friday?",
    "I would like to book a hotel room in London for three nights.",
    "What movies are playing in Berkeley this evening?",
    "Please find me a dentist in San Jose.",
    "I want to listen to some pop songs.",
    "I need a rental car in Los Angeles from Monday to Thursday.",
    "Are there any concerts in New York this weekend?",
)


def main() -> int:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--max-new-tokens", type=int, default=128)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    llm = LLM(prefix_cache=False)
    forget_outputs(llm.drafter)  # every round asks the same
    params = SamplingParams(max_new_tokens=args.max_new_tokens, ignore_eos=True)
    prompts = [f"User: {text}\nAssistant:" for text in OPENINGS]
    last: dict[str, list[GenerationResult]] = {}
    meter = LoadMeter()

    def arm(name: str, num_draft_tokens: int | None) -> float:
        last[name] = [llm.generate(prompt, params, num_draft_tokens=num_draft_tokens) for prompt in prompts]
        meter.sample()
        tokens = sum(len(result.token_ids) for result in last[name])
        return tokens / sum(result.stats.seconds_total for result in last[name])

    figures = interleave(
        {"plain": lambda: arm("plain", 0), "speculative": lambda: arm("speculative", None)}, args.rounds
    )
    equal = [a.token_ids == b.token_ids for a, b in zip(last["plain"], last["speculative"], strict=True)]
    speedup = paired_ratio(figures, "speculative", "plain")
    _show(Console(), last, equal, figures, speedup, meter.load)
    if args.out:
        results = {name: summary(values) for name, values in figures.items()} | {
            "speedup": speedup,
            "equal": all(equal),
        }
        report("demo", results, args.out)
    return 0 if all(equal) else 1


def _show(
    console: Console,
    last: dict[str, list[GenerationResult]],
    equal: list[bool],
    figures: dict[str, list[float]],
    speedup: dict[str, float],
    load: Load,
) -> None:
    console.print(f"[bold]{OPENINGS[0]}[/bold]{last['speculative'][0].text}\n", highlight=False)
    prompt = Column("prompt", no_wrap=True, max_width=18)
    table = Table(prompt, "tokens", "equal", "plain tok/s", "drafted", "speed-up", "a pass", title="the last round")
    for text, same, a, b in zip(OPENINGS, equal, last["plain"], last["speculative"], strict=True):
        x, y = a.stats.tokens_per_second, b.stats.tokens_per_second
        length = f"{b.stats.mean_acceptance_length:.2f}"
        table.add_row(
            text, str(len(b.token_ids)), "yes" if same else "NO", f"{x:.0f}", f"{y:.0f}", f"{y / x:.2f}", length
        )
    console.print(table)
    tokens = sum(len(result.token_ids) for result in last["speculative"])
    plain, fast = (statistics.median(figures[name]) for name in ("plain", "speculative"))
    console.print(
        f"{sum(equal)} of {len(equal)} texts equal, {tokens} tokens; medians of {len(figures['plain'])} rounds: plain "
        f"{plain:.0f} tok/s, speculative {fast:.0f}; one over the other, round by round: "
        f"[bold]{speedup['median']:.2f}[/bold] ({speedup['min']:.2f} to {speedup['max']:.2f})"
    )
    if load.busy:
        console.print(f"The machine was busy ({load}): figures are not what it can do. Run it again when it is idle.")


if __name__ == "__main__":
    sys.exit(main())
