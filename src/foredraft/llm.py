"""LLM: text in, the same text out, sooner. The library's front door: generate, stream, chat.

Owns the tokenizer, the engine and its runner. One loop serves every call, whichever thread it comes from.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foredraft.assembly import BUNDLED, DraftWishes, Room, assemble
from foredraft.drafters.base import Drafter
from foredraft.drafters.make import DraftSpec
from foredraft.errors import RequestError
from foredraft.habits import CALLING, LOADING, by_our_names
from foredraft.jobs import Jobs, Prompt
from foredraft.models.load import LoadOptions
from foredraft.policy import DraftPolicy
from foredraft.results import Chunk, GenerationResult, Job, raise_errors
from foredraft.runner import Runner
from foredraft.structured.compile import Grammars
from foredraft.structured.tools import ToolChoice
from foredraft.text import Message, Tool
from foredraft.types import SamplingParams
from foredraft.waiting import run, stream

__all__ = ["BUNDLED", "LLM", "Chunk", "GenerationResult", "Prompt"]

OnError = Literal["raise", "return"]
CALLS = {**CALLING, **{own.name: f"params=SamplingParams({own.name}=...)" for own in fields(SamplingParams)}}


class LLM:
    """A target model with a drafter. Calls from several threads share the steps, as a batch.

    A call drives `runner` until its own requests have ended. A server starts it (`with llm.runner: ...`) and hands it
    jobs: `llm.runner.submit(job.request, job.sink(take_chunk))`, with `job = llm.job(prompt, params)`.

    Args:
        target: a folder, a hub name or a transformers model; None is the bundled pair.
        draft: "auto", "none" (or None), a drafter's name, a draft model (folder, hub name, object), a Drafter, or a
            list of these to choose among in each step.
        dtype: "auto" keeps the checkpoint's; or float32, bfloat16, float16, by name or torch's own.
        device: "auto" is CUDA where there is one; cpu, cuda, cuda:N.
        draft_device, draft_dtype: the drafter's own; by default the target's.
        draft_weight_format: bits of a draft model, which change no text: "int8", "int4", "none" (as it is). None: four
            where it has more than a tenth of the target's bytes, else eight; on torch always eight, where that is fast.
        draft_profile: the skip profile of "skip" and "int4+skip"; by default the one that is kept for this model.
        force_profile: take a skip profile that was found for another model, if it fits.
        device_map: as transformers takes it, instead of `device`.
        tokenizer: by default the target's own; needed for text with a model object.
        chat_template: a Jinja file, or its text, in place of the tokenizer's own.
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

    @by_our_names(LOADING)
    def __init__(
        self,
        target: str | Path | PreTrainedModel | None = None,
        draft: DraftSpec | Sequence[DraftSpec] = "auto",
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        draft_dtype: str | torch.dtype | None = None,
        draft_device: str | None = None,
        draft_weight_format: str | None = None,
        draft_profile: str | Path | None = None,
        force_profile: bool = False,
        device_map: str | dict[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | Path | None = None,
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
        parts = assemble(
            target,
            LoadOptions(dtype, device, device_map, trust_remote_code, runtime, weight_format),
            DraftWishes(draft, draft_dtype, draft_device, draft_profile, force_profile, policy, draft_weight_format),
            Room(max_model_len, max_batch_size, cache_bytes, prefix_cache),
            tokenizer=tokenizer,
            chat_template=chat_template,
            require_exact=require_exact,
        )
        self.engine = parts.engine
        self.model = self.engine.target
        self.max_model_len = self.engine.max_model_len
        self.runner = Runner(self.engine)
        self.jobs = Jobs(self.engine, parts.tokenizer)
        self._tokenizer = parts.tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer. Raises RequestError where a model object came without one."""
        return self.jobs.tokenizer

    @property
    def grammars(self) -> Grammars | None:
        """The compiled grammars of the tokenizer, if there is one."""
        return self.jobs.grammars

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends a text, unless a request ignores them."""
        return self.jobs.eos_token_ids

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
    @by_our_names(CALLS)
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        num_draft_tokens: int | None = None,
        draft: str | None = "auto",
        on_error: OnError = "raise",
    ) -> GenerationResult | list[GenerationResult]:
        """Complete one prompt, or many at once; text or token ids.

        Args:
            prompts: text, token ids, or a list of either.
            params: one for all, or one each; None decodes greedily.
            num_draft_tokens: draft exactly so many each step; 0 is plain decoding, None lets the policy decide.
            draft: "auto": as the policy chooses; the name of one of this LLM's drafters to use alone; "none" or None.
            on_error: what becomes of a request that fails while it runs. "return": its result has `finish_reason`
                "error" and the `error`. "raise": the error is raised; of a list, when all the others have ended too.

        Raises:
            RequestError: a prompt is empty or too long, or a parameter is out of range; nothing has run then.
            GenerationError: some of a list of prompts failed; its `results` has all, finished or not.
        """
        if on_error not in ("raise", "return"):
            raise RequestError(f"on_error={on_error!r} is not usable; it must be 'raise' or 'return'")
        jobs, single = self.jobs.each(prompts, params, num_draft_tokens, draft)
        results = run(self.runner, jobs)
        if on_error == "raise":
            raise_errors(results, single=single)
        return results[0] if single else results

    @by_our_names(CALLS)
    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        num_draft_tokens: int | None = None,
        draft: str | None = "auto",
    ) -> Iterator[Chunk]:
        """Complete one prompt, a chunk for each step; the last one carries the result. Raises as `generate`.

        The request begins with the first chunk asked for, and ends with the iterator: closed, or dropped.
        """
        return stream(self.runner, self.job(prompt, params, num_draft_tokens, draft=draft))

    @by_our_names(CALLS)
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        num_draft_tokens: int | None = None,
        draft: str | None = "auto",
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = "auto",
        template_arguments: Mapping[str, Any] | None = None,
    ) -> GenerationResult:
        """The model's next turn in a conversation, by its own chat template.

        Args:
            messages: roles with content (text or text parts), tool calls and their results, as OpenAI has them.
            params: None decodes greedily.
            num_draft_tokens, draft: as for `generate`.
            tools: what the model may call: JSON schemas, or functions whose docstrings say each argument.
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

    @by_our_names(CALLS)
    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        num_draft_tokens: int | None = None,
        draft: str | None = "auto",
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = "auto",
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Iterator[Chunk]:
        """`chat`, a chunk for each step."""
        arguments = (tools, tool_choice, template_arguments)
        return stream(self.runner, self.chat_job(messages, params, num_draft_tokens, *arguments, draft=draft))

    @by_our_names(CALLS)
    def chat_job(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        num_draft_tokens: int | None = None,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = "auto",
        template_arguments: Mapping[str, Any] | None = None,
        *,
        draft: str | None = "auto",
        parallel_tool_calls: bool = True,
    ) -> Job:
        """A checked chat, ready for the engine; without parallel calls, one at most. Raises as `chat`."""
        arguments = (tools, tool_choice, template_arguments)
        return self.jobs.chat(
            messages, params, num_draft_tokens, *arguments, draft=draft, parallel_tool_calls=parallel_tool_calls
        )

    @by_our_names(CALLS)
    def job(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        num_draft_tokens: int | None = None,
        stop_token_ids: Sequence[int] = (),
        *,
        draft: str | None = "auto",
    ) -> Job:
        """A checked request, ready for the engine. Raises as `generate`."""
        return self.jobs.one(prompt, params, num_draft_tokens, stop_token_ids, draft=draft)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises RequestError where it is empty, too long or has ids outside the vocabulary."""
        return self.jobs.encode(prompt)
