"""What a memory of earlier outputs is worth: suffix drafts against n-gram lookup and plain decoding, one target.

    python benchmarks/suffix.py                   # all tasks
    python benchmarks/suffix.py --task loop       # 40 requests that share most of their output, as an agent's do

Each request is decoded by every arm in turn, so that a machine whose speed drifts is unfair to none; a round begins
with empty memories. `last` is over the last ten requests. Fails unless every text is plain decoding's.
"""

import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _timing import parser, report, summary
from demo import OPENINGS
from transformers.utils.logging import disable_progress_bar

from foredraft import LLM, SamplingParams
from foredraft.drafters.base import Drafter, NoDrafter
from foredraft.drafters.memory import SuffixMemory
from foredraft.drafters.ngram import NgramDrafter
from foredraft.drafters.suffix import SuffixDrafter
from foredraft.policy import Gain
from foredraft.tuning.driving import driven_by

LAST = 10
REQUESTS = 40
CITIES = ("Oakland", "San Jose", "Berkeley", "Fremont", "Palo Alto", "San Francisco", "Hayward", "Napa")
TIMES = ("tonight", "tomorrow at noon", "on Friday at 7 pm", "next Sunday", "this evening at 6")


@dataclass(frozen=True)
class Task:
    prompts: Sequence[str | list[int]]
    params: SamplingParams


def dialogues(llm: LLM, tokens: int) -> Task:
    """The eight openings of `make demo`: every request says something else."""
    return Task([f"User: {text}\nAssistant:" for text in OPENINGS], SamplingParams(max_new_tokens=tokens))


def loop(llm: LLM, tokens: int) -> Task:
    """40 requests that differ in a place and a time."""
    pairs = [(city, when) for city in CITIES for when in TIMES]
    random.Random(0).shuffle(pairs)
    texts = [f"User: I need a table for two in {city} {when}.\nAssistant:" for city, when in pairs[:REQUESTS]]
    return Task(texts, SamplingParams(max_new_tokens=tokens, ignore_eos=True))


def noise(llm: LLM, tokens: int) -> Task:
    """Random tokens, continued at a temperature that keeps them random: nothing repeats."""
    source = random.Random(0)
    prompts = [source.choices(range(llm.model.vocab_size), k=64) for _ in range(8)]
    return Task(prompts, SamplingParams(max_new_tokens=tokens, temperature=3.0, seed=1, ignore_eos=True))


TASKS: dict[str, Callable[[LLM, int], Task]] = {"dialogues": dialogues, "loop": loop, "noise": noise}


@dataclass
class Arm:
    """A drafter with a policy that learns from it alone, and the seconds of each request."""

    drafter: Drafter
    policy: Gain = field(default_factory=Gain)
    seconds: list[float] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)

    def run(self, llm: LLM, prompt: str | list[int], params: SamplingParams) -> None:
        with driven_by(llm, self.drafter, self.policy):
            result = llm.generate(prompt, params)
        self.seconds.append(result.stats.seconds_total)
        self.passes.append(result.stats.target_passes)
        self.texts.append(result.token_ids)

    def rate(self, last: int) -> float:
        return sum(map(len, self.texts[-last:])) / sum(self.seconds[-last:])

    def per_pass(self, last: int) -> float:
        return sum(map(len, self.texts[-last:])) / sum(self.passes[-last:])


def arms(llm: LLM) -> dict[str, Arm]:
    return {
        "plain": Arm(NoDrafter()),
        "ngram": Arm(NgramDrafter()),
        "suffix, own text": Arm(SuffixDrafter()),
        "suffix": Arm(SuffixDrafter(SuffixMemory(llm.model.vocab_size))),
    }


def play(llm: LLM, task: Task, order: int) -> dict[str, Arm]:
    made = arms(llm)
    for i, prompt in enumerate(task.prompts):
        names = list(made) if (i + order) % 2 == 0 else list(reversed(made))
        for name in names:
            made[name].run(llm, prompt, task.params)
    return made


def figures(rounds: list[dict[str, Arm]]) -> dict[str, Any]:
    """Tokens a second by arm, over all requests and over the last ten; ratios round by round."""
    found: dict[str, Any] = {}
    for name in rounds[0]:
        every, last = ([it[name].rate(n) for it in rounds] for n in (0, LAST))
        found[name] = {"all": summary(every), "last": summary(last)}
        found[name] |= {
            f"tokens a pass, {what}": statistics.median(it[name].per_pass(n) for it in rounds)
            for what, n in (("all", 0), ("last", LAST))
        }
        for other in ("plain", "ngram"):
            for what, n in (("all", 0), ("last", LAST)):
                ratios = [it[name].rate(n) / it[other].rate(n) for it in rounds]
                found[name][f"over {other}, {what}"] = statistics.median(ratios)
    return found


def main() -> int:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--task", choices=TASKS, action="append", help="default: all")
    flags.add_argument("--model", type=Path, help="folder or hub name; default: the bundled target")
    flags.add_argument("--tokens", type=int, default=128)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    llm = LLM(args.model, "none", max_batch_size=1, prefix_cache=False)
    results: dict[str, Any] = {}
    for name in args.task or TASKS:
        task = TASKS[name](llm, args.tokens)
        play(llm, Task(task.prompts[:2], task.params), 0)
        rounds = [play(llm, task, order) for order in range(args.rounds)]
        equal = all(arm.texts == it["plain"].texts for it in rounds for arm in it.values())
        results[name] = figures(rounds) | {"equal": equal, "requests": len(task.prompts)}
    report("suffix", results, args.out)
    return 0 if all(it["equal"] for it in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
