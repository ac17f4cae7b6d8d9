"""One call of transformers' generate(), after its own preparation: rows of token ids in, rows of token ids out.

Owns the padding, where rows end and what they end with, streamers and IPEX-LLM's statistics. Logits processors and
stopping criteria are transformers' lists as it built them; each row sees them with its own prefix, padding included.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from foredraft.engine import Engine
from foredraft.errors import PromptTooLongError, RequestError
from foredraft.runner import Runner
from foredraft.types import Request, SamplingParams, StepOutput, VerifierName

WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)  # in transformers' order


@dataclass(frozen=True, slots=True)
class Call:
    """What generate() prepared: ids and mask [B, L], and what it made of the configuration."""

    input_ids: torch.Tensor
    mask: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    do_sample: bool
    pad_token_id: int | None
    seed: int
    verifier: VerifierName = "coupled"
    streamer: Any = None

    @property
    def max_new_tokens(self) -> int:
        limits = [c.max_length for c in self.criteria if isinstance(c, MaxLengthCriteria)]
        return max(1, min(limits) - self.input_ids.shape[1])

    @property
    def ends_rows(self) -> bool:
        """Whether a row that has ended is padded; without an end-of-sequence token transformers lets it go on."""
        return len(self.input_ids) == 1 or any(hasattr(c, "eos_token_id") for c in self.criteria)


@dataclass(slots=True)
class Benchmarks:
    """IPEX-LLM's figures of one call. A round is a pass of the target after the first token, over all rows."""

    first_token_time: float = 0.0  # seconds until every row that runs at once has its first token
    generate_time: list[float] = field(default_factory=list)  # seconds, one for each round, as the next two
    draft_time: list[float] = field(default_factory=list)
    verify_time: list[float] = field(default_factory=list)
    draft_num: list[int] = field(default_factory=list)  # tokens drafted in each round
    accept_num: list[int] = field(default_factory=list)  # tokens each round added: the accepted and the target's own
    n_drafted: int = 0
    n_matched: int = 0  # of these, accepted
    n_token_generated: int = 0
    e2e_time_without_first: float = 0.0


def decode(runner: Runner, call: Call) -> tuple[torch.Tensor, Benchmarks]:
    """Run the rows to their end. Ids [B, L + new] as transformers returns them.

    Raises:
        RequestError: a row is padded on the right, has no token, or does not fit the model's context.
    """
    ends: dict[int, int] = {}
    rows = [_row(runner.engine, call, i, ends) for i in range(len(call.input_ids))]
    columns = Columns(rows, call)
    meter = Meter()
    for outputs in _steps(runner, rows):
        meter.count(outputs)
        columns.flush()
    count = max(row.num_output for row in rows) if call.ends_rows else max(ends.values())
    columns.flush(count)
    meter.benchmarks.n_token_generated = sum(min(count, row.num_output) for row in rows)
    return torch.cat((call.input_ids, columns.tensor(count)), dim=1), meter.benchmarks


def _steps(runner: Runner, rows: list[Request]) -> Iterator[list[StepOutput]]:
    """What each step gave the rows, until they have ended; leave none behind when an error or the caller ends it first.

    Raises what a row's own processor or criterion raised.
    """
    outputs: list[StepOutput] = []
    try:
        for row in rows:
            runner.submit(row, outputs.append)
        while any(row.finish_reason is None for row in rows):
            runner.run_until(lambda: bool(outputs))
            new = outputs[:]
            outputs.clear()
            error = next((output.request.error for output in new if output.request.error), None)
            if error is not None:
                raise error
            yield new
    finally:
        for row in rows:
            runner.cancel(row)


def _row(engine: Engine, call: Call, index: int, ends: dict[int, int]) -> Request:
    padded = [int(i) for i in call.input_ids[index].tolist()]
    kept = [bool(m) for m in call.mask[index].tolist()]
    prompt = [token for token, keep in zip(padded, kept, strict=True) if keep]
    _check(engine, call, index, prompt, kept)
    params, processors = _params(call)
    if processors:
        own = LogitsProcessorList(_for_row(processor, index, len(call.input_ids)) for processor in processors)
        params = _with_processor(params, RowProcessor(own, call.input_ids[index : index + 1], len(prompt)))
    eos = {int(i) for c in call.criteria if type(c) is EosTokenCriteria for i in c.eos_token_id.flatten().tolist()}
    stop = RowEnd(call, index, ends, frozenset(eos))
    return Request(prompt, params, (call.seed + index) % 2**63, stop)


def _check(engine: Engine, call: Call, index: int, prompt: list[int], kept: list[bool]) -> None:
    if not prompt:
        raise RequestError(f"row {index} has no token under its attention_mask; give at least one")
    if not kept[-1]:
        raise RequestError(
            f"row {index} of attention_mask ends with 0; pad on the left (tokenizer.padding_side='left')"
        )
    total = len(prompt) + call.max_new_tokens
    if total > engine.max_model_len:
        raise PromptTooLongError(
            f"row {index} has {len(prompt)} tokens, and {call.max_new_tokens} new ones do not fit the model's context "
            f"of {engine.max_model_len}; ask for at most max_new_tokens={max(0, engine.max_model_len - len(prompt))}"
        )
    vocabulary = engine.target.vocab_size
    outside = next((token for token in prompt if not 0 <= token < vocabulary), None)
    if outside is not None:
        raise RequestError(f"token id {outside} in row {index} is outside the vocabulary of {vocabulary}")


def _params(call: Call) -> tuple[SamplingParams, list[LogitsProcessor]]:
    """Sampling parameters, and the processors that they do not stand for.

    temperature, top_k, top_p and min_p at the end of the list are ours to do. Where a later processor follows them
    (typical_p, a watermark, ...), the list is taken as it is, and the noise is added to what comes out of it.
    """
    rest = list(call.processors)
    if not call.do_sample:
        return SamplingParams(max_new_tokens=call.max_new_tokens, verifier=call.verifier), rest
    known: dict[str, Any] = {}
    for kind in reversed(WARPERS):
        if rest and type(rest[-1]) is kind and _is_plain(rest[-1]):
            known |= _settings(rest.pop())
    known.setdefault("temperature", 1.0)
    return SamplingParams(max_new_tokens=call.max_new_tokens, verifier=call.verifier, **known), rest


def _is_plain(warper: Any) -> bool:
    """Whether its set of tokens is what our parameter of that name keeps."""
    least = getattr(warper, "min_tokens_to_keep", 1)
    filtered = getattr(warper, "filter_value", -math.inf)
    return least == 1 and filtered == -math.inf and getattr(warper, "top_p", 1.0) > 0


def _settings(warper: Any) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "min_p")
    return {name: getattr(warper, name) for name in names if hasattr(warper, name)}


def _with_processor(params: SamplingParams, processor: LogitsProcessor) -> SamplingParams:
    return replace(params, processors=(processor,))


def _for_row(processor: Any, row: int, rows: int) -> Any:
    """The processor for one row alone, where it holds something for every row."""
    if type(processor) is RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length
        if isinstance(ignored, torch.Tensor) and len(ignored) == rows:
            return RepetitionPenaltyLogitsProcessor(processor.penalty, ignored[row : row + 1])
    if type(processor) is PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
    return processor


class RowProcessor(LogitsProcessor):
    """Shows a list of processors one row's prefix [1, n] as transformers would: with the prompt's padding."""

    def __init__(self, processors: LogitsProcessorList, padded: torch.Tensor, prompt_len: int) -> None:
        self.processors = processors
        self.padded = padded  # [1, L]
        self.prompt_len = prompt_len

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        device = self.padded.device
        ids = torch.cat((self.padded, input_ids[:, self.prompt_len :].to(device)), dim=1)
        out: torch.Tensor = self.processors(ids, scores.to(device))  # type: ignore[arg-type]  # LongTensor by name only
        return out.to(scores.device)


class RowEnd:
    """A row's stop rule: its end-of-sequence tokens and the criteria, after each token with its true prefix [1, n].

    `ends` has for every row how many tokens it had when it ended. Where rows are not padded, all go on up to the last.
    """

    def __init__(self, call: Call, row: int, ends: dict[int, int], eos: frozenset[int]) -> None:
        own = [c for c in call.criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
        self.criteria = StoppingCriteriaList(own)
        self.call, self.row, self.ends, self.eos = call, row, ends, eos
        self.ids: list[int] = call.input_ids[row].tolist()
        self.count = 0

    def __call__(self, token: int) -> bool:
        self.ids.append(token)
        self.count += 1
        if self._ends(token):
            self.ends.setdefault(self.row, self.count)
        if self.call.ends_rows:
            return self.row in self.ends
        return len(self.ends) == len(self.call.input_ids) and self.count >= max(self.ends.values())

    def _ends(self, token: int) -> bool:
        stopped = self.count >= self.call.max_new_tokens or token in self.eos
        if not self.criteria:
            return stopped
        ids = torch.tensor([self.ids], device=self.call.input_ids.device)
        return bool(self.criteria(ids, None).any()) or stopped


class Columns:
    """What the rows have in common: a column [B] for each position that all of them have reached."""

    def __init__(self, rows: list[Request], call: Call) -> None:
        self.rows = rows
        self.call = call
        self.columns: list[torch.Tensor] = []

    def flush(self, count: int | None = None) -> None:
        """Hand the streamer every column that is complete, or all up to `count` and the end."""
        open_rows = [row.num_output for row in self.rows if row.finish_reason is None]
        ready = min(open_rows, default=0) if count is None else count
        for position in range(len(self.columns), ready):
            self.columns.append(torch.tensor([self._token(row, position) for row in self.rows]))
            if self.call.streamer is not None:
                self.call.streamer.put(self.columns[-1])
        if count is not None and self.call.streamer is not None:
            self.call.streamer.end()

    def _token(self, row: Request, position: int) -> int:
        if position < row.num_output:
            return row.token_ids[row.prompt_len + position]
        if self.call.pad_token_id is None:
            raise RequestError("pad_token_id=None: rows of different lengths need one to be padded with; set it")
        return self.call.pad_token_id

    def tensor(self, count: int) -> torch.Tensor:
        """Ids [B, count]."""
        return torch.stack(self.columns[:count], dim=1).to(self.call.input_ids)


class Meter:
    """Measures rounds by how the rows' own statistics move."""

    def __init__(self) -> None:
        self.benchmarks = Benchmarks()
        self.began = self.last = perf_counter()
        self.before: dict[Request, tuple[float, float, int, int]] = {}

    def count(self, outputs: list[StepOutput]) -> None:
        now, b = perf_counter(), self.benchmarks
        moved = [self._moved(output.request) for output in outputs]
        if not b.first_token_time:
            b.first_token_time = now - self.began
        else:
            drafting, verifying, drafted, accepted = (sum(column) for column in zip(*moved, strict=True))
            b.generate_time.append(now - self.last)
            b.draft_time.append(drafting)
            b.verify_time.append(verifying)
            b.draft_num.append(int(drafted))
            b.accept_num.append(sum(len(output.token_ids) for output in outputs))
            b.n_drafted += int(drafted)
            b.n_matched += int(accepted)
            b.e2e_time_without_first += now - self.last
        self.last = now

    def _moved(self, row: Request) -> tuple[float, float, int, int]:
        old = self.before.get(row, (0.0, 0.0, 0, 0))
        s = row.stats
        new = self.before[row] = (s.seconds_drafting, s.seconds_verifying, s.drafted, s.accepted)
        return new[0] - old[0], new[1] - old[1], new[2] - old[2], new[3] - old[3]
