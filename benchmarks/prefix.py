"""Shared prefixes, with and without: the same model, prompts and drafter, the arms in turn.

1. Milliseconds to the first token of a dialogue's second turn: 64, 256 or 800 tokens were said and answered before.
2. Seconds of 8 requests that come together and begin with the same 512 tokens, 32 tokens each.
Every run is a dialogue of its own, so that nothing is found but what belongs to it; tokens must be equal.
"""

from collections.abc import Callable
from itertools import count
from random import Random
from time import perf_counter

import torch
from _timing import Arm, interleave, paired_ratio, parser, report, summary
from transformers.utils.logging import disable_progress_bar

from foredraft import LLM, SamplingParams

BEFORE = (64, 256, 800)  # tokens of the first turn and its answer
ANSWER, QUESTION = 32, 16  # of these the answer; tokens of the second turn
REQUESTS, COMMON = 8, 512
ARMS = {"with": True, "without": False}

Said = dict[tuple[str, int], list[list[int]]]
"""Answers, by what was measured and the seed of the run."""
Measure = Callable[[int], tuple[float, list[list[int]]]]
"""From a seed to a figure, and what was answered."""


def words(seed: int, length: int, vocab_size: int) -> list[int]:
    source = Random(seed)
    return [source.randrange(8, vocab_size) for _ in range(length)]


def second_turn(llm: LLM, before: int, seed: int) -> tuple[float, list[list[int]]]:
    """Milliseconds to its first token; and what was answered."""
    size, params = llm.model.vocab_size, SamplingParams(max_new_tokens=ANSWER, ignore_eos=True)
    first = words(seed, before - ANSWER, size)
    answer = llm.generate(first, params).token_ids
    result = llm.generate(first + answer + words(-seed, QUESTION, size), params)
    return 1e3 * result.stats.seconds_to_first_token, [answer, result.token_ids]


def together(llm: LLM, seed: int) -> tuple[float, list[list[int]]]:
    """Seconds until all are there; and what was answered."""
    size, params = llm.model.vocab_size, SamplingParams(max_new_tokens=ANSWER, ignore_eos=True)
    common = words(seed, COMMON, size)
    prompts = [common + words(seed + i, QUESTION, size) for i in range(REQUESTS)]
    began = perf_counter()
    results = llm.generate(prompts, params)
    return perf_counter() - began, [result.token_ids for result in results]


def arms_of(llm: LLM, said: Said) -> dict[str, Arm]:
    measured: dict[str, Measure] = {
        f"second turn after {before} tokens, ms": lambda seed, n=before: second_turn(llm, n, seed) for before in BEFORE
    }
    measured[f"{REQUESTS} requests after the same {COMMON} tokens, s"] = lambda seed: together(llm, seed)
    return {name: numbered(name, measure, said) for name, measure in measured.items()}


def numbered(name: str, measure: Measure, said: Said) -> Arm:
    """A run of its own each time, whose answers are kept."""
    runs = count(1)

    def arm() -> float:
        seed = 1000 * next(runs)
        figure, said[name, seed] = measure(seed)
        return figure

    return arm


def main() -> None:
    args = parser(__doc__, rounds=7).parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    arms: dict[str, Arm] = {}
    said: dict[str, Said] = {name: {} for name in ARMS}
    for how, shares in ARMS.items():
        llm = LLM(prefix_cache=shares, max_batch_size=REQUESTS)
        arms |= {f"{name}, {how}": arm for name, arm in arms_of(llm, said[how]).items()}
    figures = interleave(arms, args.rounds)
    assert said["with"] == said["without"], "a text changed"
    results = {name: summary(values) for name, values in figures.items()}
    for name in list(arms):
        if name.endswith(", with"):
            results[name] |= {"times_as_fast": paired_ratio(figures, f"{name}out", name)["median"]}
    report("prefix", results, args.out)


if __name__ == "__main__":
    main()
