"""What transformers' generate() prepared, as our requests: one for each row, with its prompt, processors and end.

Logits processors and stopping criteria are the lists that transformers built; they are called for one row at a time,
with its prefix padded as transformers would pad it.
"""

import math
from dataclasses import dataclass, replace
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
from foredraft.types import Request, SamplingParams, VerifierName
from foredraft.upstream.generation import allowed_tokens

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
        """Whether rows that have ended are padded. Without an end-of-sequence token transformers does not end them."""
        return len(self.input_ids) == 1 or any(hasattr(c, "eos_token_id") for c in self.criteria)


def row_request(engine: Engine, call: Call, index: int, ends: dict[int, int]) -> Request:
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
    """Sampling parameters, and the processors that have to be called besides.

    temperature, top_k, top_p and min_p at the end of the list become our own parameters. If another processor follows
    them (typical_p, a watermark, ...), the whole list is called as it is, and we sample from its scores.
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
    """Whether our parameter of that name keeps the same tokens as this warper."""
    least = getattr(warper, "min_tokens_to_keep", 1)
    filtered = getattr(warper, "filter_value", -math.inf)
    return least == 1 and filtered == -math.inf and getattr(warper, "top_p", 1.0) > 0


def _settings(warper: Any) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "min_p")
    return {name: getattr(warper, name) for name in names if hasattr(warper, name)}


def _with_processor(params: SamplingParams, processor: LogitsProcessor) -> SamplingParams:
    return replace(params, processors=(processor,))


def _for_row(processor: Any, row: int, rows: int) -> Any:
    """A processor that holds something for each row, reduced to one row."""
    if type(processor) is RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length
        if isinstance(ignored, torch.Tensor) and len(ignored) == rows:
            return RepetitionPenaltyLogitsProcessor(processor.penalty, ignored[row : row + 1])
    if type(processor) is PrefixConstrainedLogitsProcessor:
        allowed = allowed_tokens(processor)
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
    return processor


class RowProcessor(LogitsProcessor):
    """Calls a list of processors with one row's prefix [1, n], padded as transformers would pad it."""

    def __init__(self, processors: LogitsProcessorList, padded: torch.Tensor, prompt_len: int) -> None:
        self.processors = processors
        self.label = ", ".join(type(processor).__name__ for processor in processors)
        self.padded = padded  # [1, L]
        self.prompt_len = prompt_len

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        device = self.padded.device
        ids = torch.cat((self.padded, input_ids[:, self.prompt_len :].to(device)), dim=1)
        out: torch.Tensor = self.processors(ids, scores.to(device))  # type: ignore[arg-type]  # LongTensor by name only
        return out.to(scores.device)


class RowEnd:
    """A row's stop rule: end-of-sequence tokens, and the criteria called with the row's prefix [1, n] after each token.

    `ends` is shared by all rows: the number of tokens with which each of them ended. If rows are not padded, every row
    goes on until the last one has ended.
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
