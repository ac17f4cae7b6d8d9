"""What a choice among drafters is worth: `auto` against each drafter alone, plain decoding and an always-wrong one.

    python benchmarks/auto.py                              # all tasks, batches of 1, 4 and 8
    python benchmarks/auto.py --task edit --batch 4        # one of them

Every group of requests is decoded by every arm in turn, so that a machine whose speed drifts is unfair to none.
Policies learn on through all rounds; the first is a warm-up and reported apart (`cold`). Memories of earlier outputs
are emptied for each round. Fails unless every text is plain decoding's.
"""

import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from _timing import parser, report, summary
from demo import OPENINGS
from transformers.utils.logging import disable_progress_bar

from foredraft import LLM, Draft, SamplingParams
from foredraft.drafters import DraftContext, make_drafter
from foredraft.drafters.base import Drafter, NoDrafter
from foredraft.drafters.memory import SuffixMemory
from foredraft.drafters.several import Several
from foredraft.drafters.suffix import SuffixDrafter
from foredraft.llm import BUNDLED
from foredraft.models.load import LoadOptions
from foredraft.policy import Choice, DraftPolicy, Gain
from foredraft.stats import SpecStats
from foredraft.tuning.driving import driven_by
from foredraft.types import Request

BATCHES = (1, 4, 8)
REQUESTS = 8
CODE = 400  # tokens of a piece of code
SINGLE = ("suffix", "model", "int4")
SOURCE = Path(__file__)


@dataclass(frozen=True)
class Task:
    prompts: Sequence[str | list[int]]
    params: Sequence[SamplingParams]


def dialogues(llm: LLM, tokens: int) -> Task:
    """The eight openings of `make demo`."""
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    return Task([f"User: {text}\nAssistant:" for text in OPENINGS], [params] * REQUESTS)


class Script:
    """Forces a text: the token at each position is given, whatever the model says."""

    def __init__(self, prompt: int, tokens: Sequence[int]) -> None:
        self.prompt, self.tokens = prompt, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = min(input_ids.shape[1] - self.prompt, len(self.tokens) - 1)
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[place]] = 0.0
        return forced


def edit(llm: LLM, tokens: int) -> Task:
    """A piece of code, and the same piece with some words changed, which a script forces."""
    lines = SOURCE.read_text(encoding="utf-8").splitlines()
    prompts, params = [], []
    for i in range(REQUESTS):
        code = "\n".join(lines[20 * i : 20 * i + 60])
        other = code.replace("prompts", "questions").replace("params", "settings").replace("llm", "lm")
        ids = llm.tokenizer.encode(code, add_special_tokens=False)[:CODE]
        prompts.append(ids)
        script = Script(len(ids), llm.tokenizer.encode(other, add_special_tokens=False)[:tokens])
        params.append(SamplingParams(max_new_tokens=tokens, ignore_eos=True, processors=(script,)))
    return Task(prompts, params)


def noise(llm: LLM, tokens: int) -> Task:
    """Random tokens, continued at a temperature that keeps them random: nothing repeats, nothing can be guessed."""
    source = random.Random(0)
    prompts = [source.choices(range(llm.model.vocab_size), k=64) for _ in range(REQUESTS)]
    return Task(prompts, [SamplingParams(max_new_tokens=tokens, temperature=3.0, seed=1, ignore_eos=True)] * REQUESTS)


TASKS: dict[str, Callable[[LLM, int], Task]] = {"dialogues": dialogues, "edit": edit, "noise": noise}


class AlwaysWrong(NoDrafter):
    """Claims to be nine tenths sure of tokens that hardly ever come, as a drafter without a model could."""

    name = "wrong"

    def propose(self, requests: list[Request], policy: DraftPolicy) -> list[Draft]:
        return [self._draft(request, policy) for request in requests]

    def _draft(self, request: Request, policy: DraftPolicy) -> Draft:
        sure: tuple[float, ...] = ()
        while len(sure) < request.draft_limit:
            sure += (0.9,)
            if not policy.go_on(request, sure):
                break
        return Draft((0,) * len(sure), self.name, confidences=sure)


@dataclass
class Arm:
    """Drafters, made anew for each round, and a policy that lives on."""

    make: Callable[[], Drafter]
    policy: DraftPolicy = field(default_factory=Gain)
    rates: list[float] = field(default_factory=list)  # tokens a second, by round
    seconds: float = 0.0
    texts: list[list[int]] = field(default_factory=list)
    stats: SpecStats = field(default_factory=SpecStats)
    drafter: Drafter = field(default_factory=NoDrafter)

    def begin(self) -> None:
        self.drafter, self.seconds, self.texts, self.stats = self.make(), 0.0, [], SpecStats()

    def run(self, llm: LLM, prompts: list[Any], params: list[SamplingParams]) -> None:
        with driven_by(llm, self.drafter, self.policy):
            began = perf_counter()
            results = llm.generate(prompts, params)
            self.seconds += perf_counter() - began
        for result in results:
            self.texts.append(result.token_ids)
            self.stats.add(result.stats)

    def end(self) -> None:
        self.rates.append(sum(map(len, self.texts)) / self.seconds)


def arms(llm: LLM, names: Sequence[str]) -> dict[str, Arm]:
    vocab = llm.model.vocab_size
    context = DraftContext(llm.model, llm.tokenizer, LoadOptions("auto", "cpu"))
    spec = {"model": BUNDLED / "draft"}
    shared = {name: make_drafter(spec.get(name, name), context) for name in names if name != "suffix"}

    def one(name: str) -> Drafter:
        return SuffixDrafter(SuffixMemory(vocab)) if name == "suffix" else shared[name]

    def several(*more: Drafter) -> Drafter:
        return Several([*(one(name) for name in names), *more])

    made = {"plain": Arm(NoDrafter), "wrong": Arm(AlwaysWrong)}
    made |= {name: Arm(partial(one, name)) for name in names}
    made["auto"] = Arm(several, Choice())
    made["auto and wrong"] = Arm(lambda: several(AlwaysWrong()), Choice())
    return made


def measure(llm: LLM, task: Task, batch: int, names: Sequence[str], rounds: int) -> dict[str, Any]:
    made = arms(llm, names)
    equal = True
    for turn in range(rounds + 1):
        for arm in made.values():
            arm.begin()
        for first in range(0, REQUESTS, batch):
            order = list(made) if (turn + first) % 2 == 0 else list(reversed(made))
            group = slice(first, first + batch)
            for name in order:
                made[name].run(llm, list(task.prompts[group]), list(task.params[group]))
        for arm in made.values():
            arm.end()
        equal = equal and all(arm.texts == made["plain"].texts for arm in made.values())
    return figures(made, names) | {"equal": equal}


def figures(made: dict[str, Arm], names: Sequence[str]) -> dict[str, Any]:
    """Tokens a second, and ratios round by round; the goals of `auto` and of the always-wrong drafter."""
    best = max(names, key=lambda name: statistics.median(made[name].rates[1:]))
    found: dict[str, Any] = {"best single": best}
    for name, arm in made.items():
        found[name] = {"rate": summary(arm.rates[1:]), "over plain": _ratio(arm, made["plain"])}
        found[name] |= {"over best single": _ratio(arm, made[best]), "cold": arm.rates[0]}
        found[name]["by source"] = arm.stats.as_dict()["by_source"]
    return found


def _ratio(over: Arm, under: Arm) -> float:
    return statistics.median(a / b for a, b in zip(over.rates[1:], under.rates[1:], strict=True))


def main() -> int:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--task", choices=TASKS, action="append", help="default: all")
    flags.add_argument("--batch", type=int, choices=BATCHES, action="append", help="default: all")
    flags.add_argument("--draft", choices=SINGLE, action="append", help="among which to choose; default: suffix, model")
    flags.add_argument("--tokens", type=int, default=128)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    llm = LLM(draft="none", max_batch_size=max(BATCHES))
    results: dict[str, Any] = {}
    for name in args.task or TASKS:
        for batch in args.batch or BATCHES:
            task = TASKS[name](llm, args.tokens)
            task = replace(task, params=[replace(own, seed=i) for i, own in enumerate(task.params)])
            results[f"{name}, batch {batch}"] = measure(llm, task, batch, args.draft or SINGLE[:2], args.rounds)
    report("auto", results, args.out)
    return 0 if all(it["equal"] for it in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
