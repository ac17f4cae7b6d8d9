"""Requests played through an engine, and what is kept of each: tokens, digests of their logits, how it ended."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import torch

from foredraft.audit.asks import Ask
from foredraft.audit.recorded import Drafted, Recorded
from foredraft.drafters.base import Drafter, NoDrafter
from foredraft.drafters.several import Several
from foredraft.engine import Engine
from foredraft.llm import LLM
from foredraft.models.base import CausalModel
from foredraft.models.rows import RowBatch
from foredraft.policy import DraftPolicy, make_policy
from foredraft.results import Job
from foredraft.runner import Runner
from foredraft.types import Request, StepOutput, TokenLogprobs


class Recorder:
    """A target that notes the logits of every position it computes, by request; the last pass over it counts."""

    def __init__(self, model: CausalModel, note: Callable[[torch.Tensor], Any]) -> None:
        self._model, self._note = model, note
        self._running: Sequence[Request] = ()
        self.notes: defaultdict[Request, dict[int, Any]] = defaultdict(dict)
        self.widths: defaultdict[Request, list[tuple[int, int]]] = defaultdict(list)  # of drafts: limit, length
        self.passes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def watch(self, engine: Engine) -> None:
        self._running = engine.scheduler.running
        watch = getattr(self._model, "watch", None)  # a planted bug may have to know too
        if watch is not None:
            watch(engine)

    def forward(self, rows: RowBatch) -> torch.Tensor:
        self.passes += 1
        logits = self._model.forward(rows)
        owner = {request.slot: request for request in self._running}
        for row, values in zip(rows.wanted, logits, strict=True):
            self.notes[owner[rows.slots[row]]][rows.positions[row]] = self._note(values)
        for slot, count in Counter(rows.slots[row] for row in rows.wanted).items():
            self.widths[owner[slot]].append((owner[slot].draft_limit, count - 1))
        return logits

    def of(self, request: Request) -> list[Any]:
        """What was noted for the logits that decided each output token; None where there were none."""
        positions = range(request.prompt_len - 1, len(request.token_ids) - 1)
        return [self.notes[request].get(position) for position in positions]


def digest(logits: torch.Tensor) -> bytes:
    """Of every bit of a row of logits."""
    return hashlib.blake2b(logits.detach().cpu().contiguous().view(torch.uint8).numpy().data, digest_size=12).digest()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request."""

    tokens: tuple[int, ...]
    notes: tuple[Any, ...]  # of the logits behind each token
    logprobs: tuple[TokenLogprobs, ...]
    reason: str
    error: str
    drafted: int
    accepted: int
    counted: bool  # do its statistics agree with its tokens?
    flags: tuple[bool, ...] = ()  # of each token: was it drafted?
    handed: tuple[tuple[int | None, bool | None], ...] = ()  # tokens and flags that the steps handed over
    text: str = ""  # what its user read step by step; of one that left, before he did
    result: str = ""  # the text of its result
    drafts: tuple[Drafted, ...] = ()  # of each pass that gave it tokens


class Reader:
    """The user of one request: keeps what the steps hand over, and leaves after so many tokens."""

    def __init__(self, job: Job, leave: Callable[[], object], leaves: int | None) -> None:
        self.job, self.leave, self.leaves = job, leave, leaves
        self.handed: list[tuple[int | None, bool | None]] = []
        self.sources: list[str] = []
        self.text = self.result = ""

    def __call__(self, output: StepOutput) -> None:
        chunk = self.job.chunk(output)
        self.handed += zip_longest(output.token_ids, output.from_draft)
        if output.token_ids or not output.finish_reason:
            self.sources.append(output.source)
        if output.finish_reason != "abort":
            self.text += chunk.text
        if chunk.result is not None:
            self.result = chunk.result.text
        if self.leaves is not None and self.job.request.num_output >= self.leaves and not output.finish_reason:
            self.leave()


@dataclass(frozen=True, slots=True)
class Subject:
    """What is audited: who drafts, by which policy, on which engine and target. Planted bugs replace a part of it."""

    drafter: Drafter = field(default_factory=NoDrafter)
    policy: str | None = None
    engine: type[Engine] = Engine
    target: Callable[[CausalModel], CausalModel] = lambda model: model

    def make_policy(self) -> DraftPolicy:
        return make_policy(self.policy, several=isinstance(self.drafter, Several))


PLAIN = Subject()


def play(
    llm: LLM, subject: Subject, asks: Sequence[Ask], batch: int, note: Callable[[torch.Tensor], Any] = digest
) -> list[Outcome]:
    """Run the requests to their ends, `batch` at once; what happens to one is an outcome, never raised."""
    target = Recorder(subject.target(llm.model), note)
    recorded = Recorded() if any(ask.drafts for ask in asks) else None
    policy = recorded or subject.make_policy()
    cache, before = llm.model.cache, llm.model.cache.max_slots
    cache.max_slots = batch
    try:
        engine = subject.engine(
            target,
            subject.drafter,
            policy,
            max_batch_size=batch,
            max_model_len=llm.max_model_len,
            limits=llm.engine.admission.limits,
        )
        target.watch(engine)
        with llm.engine.using(subject.drafter, engine.policy.policy):  # whom the library checks requests against
            jobs = [ask.job(llm) for ask in asks]
        if recorded is not None:
            recorded.drafts = {job.request: ask.drafts for job, ask in zip(jobs, asks, strict=True) if ask.drafts}
        readers = _drive(Runner(engine), target, jobs, asks)
        return [_outcome(reader, target) for reader in readers]
    finally:
        cache.max_slots = before


def _drive(runner: Runner, target: Recorder, jobs: Sequence[Job], asks: Sequence[Ask]) -> list[Reader]:
    """Submit each request when its time has come, and cancel those that leave."""
    readers = [
        Reader(job, partial(runner.cancel, job.request), ask.leaves) for job, ask in zip(jobs, asks, strict=True)
    ]
    waiting = sorted(zip(asks, readers, strict=True), key=lambda pair: pair[0].arrives)
    while waiting or runner.has_work:
        while waiting and (waiting[0][0].arrives <= target.passes or not runner.has_work):
            _, reader = waiting.pop(0)
            runner.submit(reader.job.request, reader)
        arrives = waiting[0][0].arrives if waiting else None
        runner.run_until(partial(_reached, runner, target, arrives))
    return readers


def _reached(runner: Runner, target: Recorder, passes: int | None) -> bool:
    return not runner.has_work or (passes is not None and target.passes >= passes)


def _outcome(reader: Reader, target: Recorder) -> Outcome:
    request = reader.job.request
    stats, tokens = request.stats, tuple(request.output_ids)
    counted = stats.output_tokens == len(tokens) and stats.accepted == sum(request.from_draft) <= stats.drafted
    return Outcome(
        tokens,
        tuple(target.of(request)),
        tuple(request.logprobs),
        request.finish_reason or "",
        "" if request.error is None else f"{type(request.error).__name__}: {request.error}",
        stats.drafted,
        stats.accepted,
        counted,
        tuple(request.from_draft),
        tuple(reader.handed),
        reader.text,
        reader.result,
        tuple(Drafted(*width, source) for width, source in zip(target.widths[request], reader.sources, strict=False)),
    )
