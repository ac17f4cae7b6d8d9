"""One request in one arm: its tokens, its seconds, when each token came.

Steps are heard as a server hears them, so that no arm pays for being watched.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from foredraft.bench.tasks import Task
from foredraft.llm import LLM
from foredraft.results import GenerationResult
from foredraft.stats import SpecStats
from foredraft.text import Message, end_of_turn_ids, render_chat
from foredraft.types import SamplingParams, StepOutput


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of everything said so far, and the tokens that end the next turn."""

    token_ids: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """`arrivals` has, for each step, the seconds since the request was made and the tokens there were by then."""

    seconds: float
    token_ids: tuple[int, ...]
    text: str
    stats: SpecStats
    arrivals: tuple[tuple[float, int], ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A task whose turns are put together from what was said."""

    llm: LLM
    task: Task
    chat: bool

    def prompt(self, answers: Sequence[str]) -> Prompt:
        """What stands before the next answer. Raises RequestError as `LLM.encode` does."""
        turns = self.task.turns
        if not self.chat:
            said = "".join(f"{turn}{answer}\n" for turn, answer in zip(turns, answers, strict=False))
            return Prompt(tuple(self.llm.encode(said + turns[len(answers)])), ())
        messages: list[Message] = [{"role": "user", "content": turns[0]}]
        for answer, turn in zip(answers, turns[1:], strict=False):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        ids = self.llm.encode(render_chat(self.llm.tokenizer, messages))
        return Prompt(tuple(ids), end_of_turn_ids(self.llm.tokenizer))


def conversation(llm: LLM, task: Task, chat: bool | None) -> Conversation:
    """`chat` is the user's wish, which comes before the task's own; else the template decides."""
    own = task.chat if chat is None else chat
    return Conversation(llm, task, bool(llm.tokenizer.chat_template) if own is None else own)


def ask(llm: LLM, prompt: Prompt, params: SamplingParams, num_draft_tokens: int | None, memory: str) -> Run:
    """Generate, alone. Drafts may come from earlier outputs of the same `memory` only.

    Raises:
        KeyboardInterrupt: the request has been cancelled then.
    """
    job = llm.job(list(prompt.token_ids), params, num_draft_tokens, stop_token_ids=prompt.ends)
    job.request.memory = memory
    steps: list[tuple[float, int]] = []
    ended: list[bool] = []

    def heard(output: StepOutput) -> None:
        steps.append((perf_counter() - began, len(output.token_ids)))
        ended.extend([True] if output.finish_reason else [])

    began = perf_counter()
    try:
        llm.runner.submit(job.request, heard)
        llm.runner.run_until(lambda: bool(ended))
    finally:
        llm.runner.cancel(job.request)
    return _run(job.result(), steps)


def _run(result: GenerationResult, steps: Sequence[tuple[float, int]]) -> Run:
    if result.error is not None:
        raise result.error
    counts = itertools.accumulate(tokens for _, tokens in steps)
    arrivals = tuple((moment, count) for (moment, tokens), count in zip(steps, counts, strict=True) if tokens)
    return Run(result.stats.seconds_total, tuple(result.token_ids), result.text, result.stats, arrivals)
