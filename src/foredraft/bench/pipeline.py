"""A run from beginning to end: what can be measured is, and becomes one result. Knows nothing of how it is shown."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from foredraft.bench import programs, quality, sandbox
from foredraft.bench.asking import conversation
from foredraft.bench.figures import arm_figures, tokens_over_time
from foredraft.bench.measure import PLAIN, Measured, Request, measure, prompt_with_room
from foredraft.bench.options import BenchOptions
from foredraft.bench.prediction import Prediction, predict
from foredraft.bench.quality import PassRates
from foredraft.bench.result import Bench, Counts, Memory
from foredraft.bench.tasks import Task, spread
from foredraft.diagnosis.setting import Setting, setting
from foredraft.errors import RequestError
from foredraft.llm import LLM
from foredraft.tuning.machine import Load, LoadMeter
from foredraft.tuning.options import Watcher

Made = TypeVar("Made")


def check_tasks(tasks: Sequence[Task], options: BenchOptions) -> tuple[Task, ...]:
    """The tasks of this run, checked before anything is loaded.

    Raises:
        RequestError: code shall be run and no task has a test, or this system cannot limit it.
        ForedraftError: a task needs a package that is not installed.
    """
    chosen = spread(tasks, options.limit)
    if options.run_code:
        sandbox.check_supported()
        if not any(map(programs.has_test, chosen)):
            raise RequestError(
                "--run-code: no task has a test; a task needs `test` and `entry_point`, or a function with `>>>` "
                "examples in its prompt"
            )
    if any(map(quality.is_summary, chosen)):
        quality.check_rouge()
    return chosen


def bench(
    llm: LLM,
    tasks: Sequence[Task],
    options: BenchOptions,
    *,
    name: str = "",
    drafter: str = "",
    watcher: Watcher | None = None,
) -> Bench:
    """Measure every arm on every task. The LLM must be idle, and drafts as before afterwards.

    Ctrl-C (KeyboardInterrupt) ends what runs then and keeps the requests that all arms have answered.

    Args:
        name, drafter: what the report calls the target and who drafts.

    Raises:
        RequestError: nothing is drafted, a draft length is not exact here, or no task fits the context.
        ForedraftError: a request failed.
    """
    check_drafting(llm, options)
    return Pipeline(llm, options, setting(llm, name), drafter or llm.drafter.name, watcher or Watcher()).run(tasks)


def check_drafting(llm: LLM, options: BenchOptions) -> None:
    if llm.drafter.name == "none":
        raise RequestError("nothing is drafted, so there is nothing to compare with plain decoding; choose a drafter")
    most = llm.model.row_invariance.max_draft_tokens
    longest = max((length for length in options.lengths if length is not None), default=0)
    if longest > most:
        raise RequestError(
            f"gamma {longest} is not usable; the widest pass that is exact here allows drafts of up to {most} tokens"
        )


def fits(llm: LLM, tasks: Sequence[Task], options: BenchOptions) -> list[Task]:
    """The tasks whose first turn and longest answer the context has room for."""
    found = [
        task
        for task in tasks
        if prompt_with_room(llm, conversation(llm, task, options.chat).prompt, [], options) is not None
    ]
    if not found:
        raise RequestError(
            f"no prompt and its answer of {options.params.max_new_tokens} tokens fit the context of "
            f"{llm.max_model_len}; give shorter ones, or a smaller --max-new-tokens"
        )
    return found


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One run of `bench`."""

    llm: LLM
    options: BenchOptions
    setting: Setting
    drafter: str
    watcher: Watcher

    def run(self, tasks: Sequence[Task]) -> Bench:
        fitting = fits(self.llm, tasks, self.options)
        found, load = self._measured(fitting)
        memory = measured_memory(self.llm)
        requests, options = list(found.requests.values()), self.options
        names, prediction = [arm.name for arm in found.arms], self._prediction(found, requests)
        arms = tuple(arm_figures(requests, arm.name, arm.num_draft_tokens) for arm in found.arms)
        best = max(arms[1:], key=lambda arm: arm.speedup.value)
        return Bench(
            self.setting,
            self.drafter,
            options,
            counts(requests, len(tasks) - len(fitting) + len(found.left_out)),
            arms,
            tuple(found.differences()) if options.comparable else (),
            self.llm.model.row_invariance.exact and options.comparable,
            prediction,
            tokens_over_time(requests, [PLAIN, best.name]),
            memory,
            load,
            self._rouge(found, requests, names),
            self._pass_rates(found, requests, names),
            found.interrupted,
        )

    def _measured(self, tasks: Sequence[Task]) -> tuple[Measured, Load]:
        meter = LoadMeter()

        def tick(category: str) -> None:
            meter.sample()
            self.watcher.tick(category)

        self.watcher.stage("measuring", self.options.rounds * len(tasks))
        return measure(self.llm, tasks, self.options, tick), meter.load

    def _prediction(self, found: Measured, requests: Sequence[Request]) -> Prediction | None:
        if found.interrupted or not self.options.predict:
            return None
        return self._phase(found, "predicting", lambda: predict(self.llm, requests, self.options))

    def _rouge(self, found: Measured, requests: Sequence[Request], arms: Sequence[str]) -> quality.Rouge | None:
        if not any(quality.is_summary(it.place.task) for it in requests):
            return None
        return self._phase(found, "reading summaries", lambda: quality.rouge(requests, arms))

    def _pass_rates(self, found: Measured, requests: Sequence[Request], arms: Sequence[str]) -> PassRates | None:
        if not self.options.run_code:
            return None
        return self._phase(found, "running code", lambda: quality.pass_rates(requests, arms))

    def _phase(self, found: Measured, name: str, work: Callable[[], Made | None]) -> Made | None:
        """None where the user does not wait for it; all else is kept."""
        self.watcher.stage(name, 0)
        try:
            return work()
        except KeyboardInterrupt:
            found.interrupted = True
            return None


def counts(requests: Sequence[Request], left_out: int) -> Counts:
    return Counts(
        len({it.place.index for it in requests}),
        len(requests),
        min(len(it.rounds) for it in requests),
        sum(len(it.reference.token_ids) for it in requests),
        left_out,
    )


def measured_memory(llm: LLM) -> Memory:
    return Memory(**llm.memory, peak=_peak(llm.model.device))


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
