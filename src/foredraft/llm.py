"""LLM: text in, the same text out, sooner. The library's front door: generate, stream, chat.

Owns the tokenizer, the engine and its runner. One loop serves every call, whichever thread it comes from.
"""

import operator
import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foredraft.admission import CacheLimits
from foredraft.drafters.base import Drafter
from foredraft.drafters.listed import automatic, check_asked, check_listed, check_place, make_drafters
from foredraft.drafters.make import DraftContext, DraftSpec
from foredraft.drafters.several import Several
from foredraft.engine import Engine
from foredraft.errors import GenerationError, PromptTooLongError, RequestError
from foredraft.models.cache import GRANULE
from foredraft.models.invariance import check_exact
from foredraft.models.load import LoadOptions, find_tokenizer, load_target, model_or_name
from foredraft.models.rows import round_up
from foredraft.policy import DraftPolicy, make_policy
from foredraft.results import Chunk, GenerationResult, Job
from foredraft.runner import Runner
from foredraft.structured import Constraint, Structured
from foredraft.structured.compile import Grammars
from foredraft.structured.tools import Calling, ToolChoice
from foredraft.text import Message, TextStream, Tool, encode_text, end_of_turn_ids, render_chat
from foredraft.types import Request, SamplingParams, StepOutput, is_whole
from foredraft.upstream.modules import unwrapped

BUNDLED = Path(__file__).parent / "bundled"
Prompt = str | Sequence[int]
OnError = Literal["raise", "return"]


class LLM:
    """A target model with a drafter. Calls from several threads share the steps, as a batch.

    A call drives `runner` until its own requests have ended. A server starts it (`with llm.runner: ...`) and hands it
    jobs: `llm.runner.submit(job.request, job.sink(take_chunk))`, with `job = llm.job(prompt, params)`.

    Args:
        target: a folder, a hub name or a transformers model; None is the bundled pair.
        draft: "auto", "none", a drafter's name, a draft model (folder, hub name, object), a Drafter, or a list of these
            to choose among in each step.
        dtype: "auto" keeps the checkpoint's; or float32, bfloat16, float16, by name or torch's own.
        device: "auto" is CUDA where there is one; cpu, cuda, cuda:N.
        draft_device, draft_dtype: the drafter's own; by default the target's.
        draft_profile: the skip profile of "skip" and "int4+skip"; by default the one that is kept for this model.
        force_profile: take a skip profile that was found for another model, if it fits.
        device_map: as transformers takes it, instead of `device`.
        tokenizer: by default the target's own; needed for text with a model object.
        max_model_len: tokens of prompt and output together; by default what the model was trained for.
        max_batch_size: sequences that run at once; others wait.
        cache_bytes: what the caches of target and drafters may take together; a request that does not fit beside those
            that run waits. None: 90 % of what is free once the models are loaded.
        prefix_cache: whether a prompt that begins like an earlier text takes over what was computed of that (native
            runtime; never changes a token): True, False, or how many of `cache_bytes` ended texts may hold on to.
        weight_format: "int4" or "int8" rounds the target's linear layers on loading; None leaves them as they are.
        runtime: "auto" is native (a C library, on CPUs) where model and machine allow it, else torch; or one of them.
        policy: how far to draft: "gain" (default), "fixed", "heuristic", "threshold", or a DraftPolicy.
        require_exact: refuse a model whose passes do not agree bit for bit here; otherwise that is a warning.

    Raises:
        ModelError: a checkpoint does not load, or cannot serve.
        ExactnessError: `require_exact`, and drafting may change this model's tokens here.
        RequestError: an argument is not usable.
    """

    def __init__(
        self,
        target: str | Path | PreTrainedModel | None = None,
        draft: DraftSpec | Sequence[DraftSpec] = "auto",
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        draft_dtype: str | torch.dtype | None = None,
        draft_device: str | None = None,
        draft_profile: str | Path | None = None,
        force_profile: bool = False,
        device_map: str | dict[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        trust_remote_code: bool = False,
        max_model_len: int | None = None,
        max_batch_size: int = 8,
        policy: str | DraftPolicy | None = None,
        cache_bytes: int | None = None,
        prefix_cache: bool | int = True,
        weight_format: str | None = None,
        runtime: str = "auto",
        require_exact: bool = False,
    ) -> None:
        if not is_whole(max_batch_size, 1):
            raise RequestError(f"max_batch_size={max_batch_size!r} is not usable; it must be 1 or more, and whole")
        if not _is_tokenizer(tokenizer):
            raise RequestError(f"tokenizer={tokenizer!r} is not usable; pass one of transformers, or None")
        options = LoadOptions(dtype, device, device_map, trust_remote_code, runtime, weight_format)
        make_policy(policy)  # an unknown name is said before anything is loaded
        bundled = BUNDLED / "draft" if target is None else None
        drafts = [unwrapped(it) for it in (draft if isinstance(draft, (list, tuple)) else [draft])]
        target = model_or_name(BUNDLED / "target" if target is None else target)
        if isinstance(target, PreTrainedModel):
            options.check_object(target)
        draft_options = LoadOptions(draft_dtype or dtype, draft_device or device, None, trust_remote_code, runtime)
        check_listed(drafts)
        check_place(drafts, bundled, draft_dtype=draft_dtype, draft_device=draft_device)
        self.model = load_target(target, options)
        check_exact(self.model, required=require_exact)
        if tokenizer is None and not isinstance(target, PreTrainedModel):
            tokenizer = find_tokenizer(target, options)
        self._tokenizer = tokenizer
        self.max_model_len = _context(max_model_len, self.model.max_positions)
        self.grammars = None if tokenizer is None else Grammars(tokenizer, self.model.vocab_size)
        context = DraftContext(self.model, tokenizer, draft_options, draft_profile, force_profile)
        drafter = automatic(context, bundled) if drafts == ["auto"] else make_drafters(drafts, context)
        chosen_policy = make_policy(policy, several=isinstance(drafter, Several))
        self.model.cache.max_slots = max_batch_size
        self.model.cache.max_length = round_up(self.max_model_len, GRANULE)
        self.engine = Engine(
            self.model,
            drafter,
            chosen_policy,
            max_batch_size=max_batch_size,
            max_model_len=self.max_model_len,
            limits=CacheLimits.of(cache_bytes, prefix_cache, self.model.device),
        )
        self.runner = Runner(self.engine)
        self.eos_token_ids = frozenset(_eos_ids(self.model.config, self.model.generation_config, tokenizer))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer. Raises RequestError where a model object came without one."""
        if self._tokenizer is None:
            raise RequestError("this LLM has a model without a tokenizer; pass tokenizer=..., or token ids for text")
        return self._tokenizer

    @property
    def drafter(self) -> Drafter:
        """Who guesses for requests that ask for nothing else."""
        return self.engine.drafter

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the target's weights, of what drafting adds to them, of both caches for what runs now, and of what
        ended texts left in them."""
        return {
            "target_weights": self.model.weight_bytes,
            "draft_weights": getattr(self.drafter, "weight_bytes", 0),
            "target_cache": self.model.cache.nbytes,
            "draft_cache": getattr(self.drafter, "cache_bytes", 0),
            "prefix_cache": sum(cache.kept_bytes for cache in self.engine.caches()),
        }

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str
        self,
        prompts: Prompt,
        params: SamplingParams | None = ...,
        *,
        num_draft_tokens: int | None = ...,
        draft: str | None = ...,
        on_error: OnError = ...,
    ) -> GenerationResult: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = ...,
        *,
        num_draft_tokens: int | None = ...,
        draft: str | None = ...,
        on_error: OnError = ...,
    ) -> list[GenerationResult]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        num_draft_tokens: int | None = None,
        draft: str | None = None,
        on_error: OnError = "raise",
    ) -> GenerationResult | list[GenerationResult]:
        """Complete one prompt, or many at once; text or token ids.

        Args:
            prompts: text, token ids, or a list of either.
            params: one for all, or one each; None decodes greedily.
            num_draft_tokens: draft exactly so many each step; 0 is plain decoding, None lets the policy decide.
            draft: the name of one of this LLM's drafters to use alone, or "none"; None: as the policy chooses.
            on_error: what becomes of a request that fails while it runs. "return": its result has `finish_reason`
                "error" and the `error`. "raise": the error is raised; of a list, when all the others have ended too.

        Raises:
            RequestError: a prompt is empty or too long, or a parameter is out of range; nothing has run then.
            GenerationError: some of a list of prompts failed; its `results` has all, finished or not.
        """
        if on_error not in ("raise", "return"):
            raise RequestError(f"on_error={on_error!r} is not usable; it must be 'raise' or 'return'")
        if isinstance(prompts, torch.Tensor):
            prompts = prompts.tolist()
        if not isinstance(prompts, Sequence):
            raise RequestError(f"prompts={prompts!r} is not usable; give text, token ids, or a list of either")
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
        batch: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]
        each = list(params) if isinstance(params, Sequence) else [params] * len(batch)
        if len(each) != len(batch):
            raise RequestError(f"{len(each)} sampling parameters for {len(batch)} prompts; give one, or one each")
        jobs: list[Job] = []
        for prompt, own in zip(batch, each, strict=True):
            with _which(None if single else len(jobs)):
                jobs.append(self.job(prompt, own, num_draft_tokens, draft=draft))
        results = self._run(jobs)
        if on_error == "raise":
            _raise_errors(results, single=single)
        return results[0] if single else results

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        num_draft_tokens: int | None = None,
        draft: str | None = None,
    ) -> Iterator[Chunk]:
        """Complete one prompt, a chunk for each step; the last one carries the result. Raises as `generate`.

        The request begins with the first chunk asked for, and ends with the iterator: closed, or dropped.
        """
        return self._stream(self.job(prompt, params, num_draft_tokens, draft=draft))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        num_draft_tokens: int | None = None,
        draft: str | None = None,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = "auto",
        template_arguments: Mapping[str, Any] | None = None,
    ) -> GenerationResult:
        """The model's next turn in a conversation, by its own chat template.

        Args:
            messages: roles with content (text or text parts), tool calls and their results, as OpenAI has them.
            params: None decodes greedily.
            num_draft_tokens, draft: as for `generate`.
            tools: what the model may call: JSON schemas, or functions that transformers can make one of.
            tool_choice: "auto", "none", "required" or a tool's name; calls are in the result's `tool_calls`.
            template_arguments: further variables of the template, as `documents` or `enable_thinking`.

        Raises:
            RequestError: as `generate`, and where the template cannot honour what it is given.
        """
        *_, last = self.stream_chat(
            messages,
            params,
            num_draft_tokens=num_draft_tokens,
            draft=draft,
            tools=tools,
            tool_choice=tool_choice,
            template_arguments=template_arguments,
        )
        assert last.result is not None
        return last.result

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        num_draft_tokens: int | None = None,
        draft: str | None = None,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = "auto",
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Iterator[Chunk]:
        """`chat`, a chunk for each step."""
        arguments = (tools, tool_choice, template_arguments)
        return self._stream(self.chat_job(messages, params, num_draft_tokens, *arguments, draft=draft))

    def chat_job(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        num_draft_tokens: int | None = None,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = "auto",
        template_arguments: Mapping[str, Any] | None = None,
        *,
        draft: str | None = None,
    ) -> Job:
        """A checked chat, ready for the engine. Raises as `chat`."""
        calling = Calling(self.tokenizer, self.grammars, tools, tool_choice)
        prompt = render_chat(self.tokenizer, messages, calling.shown, template_arguments)
        params = params or SamplingParams()
        params = replace(params, structured=calling.beside(params.structured))  # type: ignore[arg-type]  # checked there
        ends = end_of_turn_ids(self.tokenizer)
        job = self.job(prompt, params, num_draft_tokens, ends, draft=draft)
        return replace(job, read_calls=calling.read)

    def job(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        num_draft_tokens: int | None = None,
        stop_token_ids: Sequence[int] = (),
        *,
        draft: str | None = None,
    ) -> Job:
        """A checked request, ready for the engine. Raises as `generate`."""
        if not isinstance(params, SamplingParams | None):
            raise RequestError(f"params={params!r} is not usable; pass SamplingParams(...)")
        params = params or SamplingParams()
        self._check_draft_length(num_draft_tokens)
        check_asked(self.drafter, draft, num_draft_tokens)
        self._check_ids(params)
        ids = self.encode(prompt)
        eos = frozenset() if params.ignore_eos else self.eos_token_ids.union(stop_token_ids)
        stream = None if self._tokenizer is None else TextStream(self._tokenizer, params.stop, ids)
        if stream is None and params.stop:
            raise RequestError(f"stop={params.stop!r} needs a tokenizer; pass one to LLM, or use stop_token_ids")
        request = Request(
            ids,
            params,
            seed=secrets.randbits(63) if params.seed is None else int(params.seed),
            stop_rule=stream.push if stream else _never,
            num_draft_tokens=0 if draft == "none" else num_draft_tokens,
            drafter=draft or self._steady_drafter(params, num_draft_tokens),
            stop_token_ids=eos.union(params.stop_token_ids),
            constraint=self._constraint(params, (*stop_token_ids, *sorted(eos.difference(stop_token_ids)))),
        )
        return Job(request, stream, self.model.row_invariance.exact)

    def _constraint(self, params: SamplingParams, ends: tuple[int, ...]) -> Constraint | None:
        """What holds the output to the form that was asked for; compiled here, in the caller's time."""
        if params.structured is None:
            return None
        if self.grammars is None:
            raise RequestError("structured output needs a tokenizer; pass one to LLM")
        return self.grammars.constraint(Structured.of(params.structured), ends or params.stop_token_ids)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises RequestError where it is empty, too long or has ids outside the vocabulary."""
        if isinstance(prompt, str):
            ids = encode_text(self.tokenizer, prompt)
        else:
            try:
                ids = [operator.index(i) for i in prompt]
            except TypeError:
                known = "give one text, or one list of token ids"
                raise RequestError(f"the prompt {prompt!r} is not usable; {known}") from None
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        if len(ids) >= self.max_model_len:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, and the context of {self.max_model_len} leaves no room for output; "
                f"shorten the prompt to at most {self.max_model_len - 1} tokens"
            )
        outside = next((i for i in ids if not 0 <= i < self.model.vocab_size), None)
        if outside is not None:
            raise RequestError(f"token id {outside} is outside the vocabulary of {self.model.vocab_size}")
        return ids

    def _check_draft_length(self, num_draft_tokens: int | None) -> None:
        most = self.model.row_invariance.max_draft_tokens
        if num_draft_tokens is not None and not is_whole(num_draft_tokens, 0, most):
            raise RequestError(
                f"num_draft_tokens={num_draft_tokens!r} is not usable; it must be whole and in [0, {most}], the widest "
                "pass that was probed to be exact"
            )

    def _steady_drafter(self, params: SamplingParams, num_draft_tokens: int | None) -> str | None:
        """Rejection sampling repeats a seed's text only where the same drafter drafts in each step, equally far."""
        repeats = params.verifier == "rejection" and not params.greedy and num_draft_tokens
        return self.drafter.steady if repeats and isinstance(self.drafter, Several) else None

    def _check_ids(self, params: SamplingParams) -> None:
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            outside = [token for token in ids if not 0 <= token < self.model.vocab_size]
            if outside:
                most = self.model.vocab_size - 1
                raise RequestError(f"{name} names tokens {outside}; this vocabulary has ids 0 to {most}")

    def _run(self, jobs: list[Job]) -> list[GenerationResult]:
        """Drive until these have ended; leave none of them behind when the caller is interrupted."""
        open_requests = {job.request for job in jobs}

        def heard(output: StepOutput) -> None:
            if output.finish_reason:
                open_requests.discard(output.request)

        try:
            for job in jobs:
                self.runner.submit(job.request, heard)
            self.runner.run_until(lambda: not open_requests)
        finally:
            for job in jobs:
                self.runner.cancel(job.request)
        return [job.result() for job in jobs]

    def _stream(self, job: Job) -> Iterator[Chunk]:
        chunks: deque[Chunk] = deque()  # more than one where other calls drive in the meantime
        self.runner.submit(job.request, job.sink(chunks.append))
        try:
            while True:
                self.runner.run_until(lambda: bool(chunks))
                chunk = chunks.popleft()
                if chunk.result and chunk.result.error:
                    raise chunk.result.error
                yield chunk
                if chunk.result:
                    return
        finally:
            self.runner.cancel(job.request)


@contextmanager
def _which(index: int | None) -> Iterator[None]:
    """An error about one of several prompts says which."""
    try:
        yield
    except RequestError as error:
        if index is None:
            raise
        raise type(error)(f"prompts[{index}]: {error}") from error


def _raise_errors(results: list[GenerationResult], *, single: bool) -> None:
    """Raises the error of a single request; of several a GenerationError that has all results."""
    failed = [(i, result.error) for i, result in enumerate(results) if result.error is not None]
    if not failed:
        return
    first = failed[0][1]
    if single:
        raise first
    where = ", ".join(str(i) for i, _ in failed)
    raise GenerationError(
        f"{len(failed)} of {len(results)} requests failed (index {where}; the first: {type(first).__name__}: {first}); "
        "`results` of this error has all of them, and on_error='return' returns them instead",
        results,
    ) from first


def _is_tokenizer(value: object) -> bool:
    return isinstance(value, PreTrainedTokenizerBase | None)


def _never(token_id: int) -> bool:
    return False


def _context(asked: int | None, most: int) -> int:
    if asked is None:
        return most
    if not is_whole(asked, 2, most):
        raise RequestError(f"max_model_len={asked!r} is not usable; this model's context allows 2 to {most}")
    return asked


def _eos_ids(*sources: object) -> set[int]:
    """Every id that ends a text, of the configuration, the generation configuration and the tokenizer."""
    found: set[int] = set()
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return found
