"""From what a caller asks for to checked requests: prompts, parameters, forms, tools. Nothing runs here."""

import operator
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from foredraft.drafters.listed import check_asked
from foredraft.drafters.several import Several
from foredraft.engine import Engine
from foredraft.errors import PromptTooLongError, RequestError
from foredraft.results import Job
from foredraft.structured import Constraint, Structured
from foredraft.structured.compile import Grammars
from foredraft.structured.thinking import AfterThinking, Thinking, warn_of_spelled
from foredraft.structured.tools import Calling, ToolChoice
from foredraft.text import Message, TextStream, Tool, encode_text, end_of_turn_ids, render_chat
from foredraft.types import Request, SamplingParams, is_whole

Prompt = str | Sequence[int]


class Jobs:
    """Makes the jobs of one engine, in the caller's time."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.engine = engine
        target = engine.target
        self.vocab_size = target.vocab_size
        self._tokenizer = tokenizer
        self.grammars = None if tokenizer is None else Grammars(tokenizer, self.vocab_size)
        self.eos_token_ids = frozenset(_eos_ids(target.config, target.generation_config, tokenizer))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer. Raises RequestError where a model object came without one."""
        if self._tokenizer is None:
            raise RequestError("this LLM has a model without a tokenizer; pass tokenizer=..., or token ids for text")
        return self._tokenizer

    def each(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        num_draft_tokens: int | None,
        draft: str | None,
    ) -> tuple[list[Job], bool]:
        """A job for each prompt, and whether it was a single one that was given. Raises as `LLM.generate`."""
        if isinstance(prompts, torch.Tensor | np.ndarray):
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
                jobs.append(self.one(prompt, own, num_draft_tokens, draft=draft))
        return jobs, single

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None,
        num_draft_tokens: int | None,
        tools: Sequence[Tool],
        tool_choice: ToolChoice,
        template_arguments: Mapping[str, Any] | None,
        *,
        draft: str | None,
        parallel_tool_calls: bool = True,
    ) -> Job:
        """The job of a conversation's next turn. Raises as `LLM.chat`."""
        calling = Calling(self.tokenizer, self.grammars, tools, tool_choice, several=parallel_tool_calls)
        prompt = render_chat(self.tokenizer, messages, calling.shown, template_arguments)
        params = params or SamplingParams()
        params = replace(params, structured=calling.beside(params.structured))  # type: ignore[arg-type]  # checked there
        ends = end_of_turn_ids(self.tokenizer)
        thinking = Thinking.of(self.tokenizer, prompt)
        if thinking is None and params.structured is not None:
            warn_of_spelled(self.tokenizer, prompt)
        with calling.blaming():
            job = self.one(prompt, params, num_draft_tokens, ends, draft=draft, thinking=thinking)
        return replace(job, read_calls=calling.read, call_mark=calling.mark)

    def one(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        num_draft_tokens: int | None = None,
        stop_token_ids: Sequence[int] = (),
        *,
        draft: str | None = "auto",
        thinking: Thinking | None = None,
    ) -> Job:
        """The job of one prompt; with `thinking`, that of a chat's turn, a form is that of the answer alone.

        Raises as `LLM.generate`.
        """
        if not isinstance(params, SamplingParams | None):
            raise RequestError(f"params={params!r} is not usable; pass SamplingParams(...)")
        params = params or SamplingParams()
        self._check_draft_length(num_draft_tokens)
        check_asked(self.engine.drafter, draft, num_draft_tokens)
        draft = "none" if draft is None else draft
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
            drafter=self._steady_drafter(params, num_draft_tokens) if draft == "auto" else draft,
            stop_token_ids=eos.union(params.stop_token_ids),
            constraint=self._constraint(params, (*stop_token_ids, *sorted(eos.difference(stop_token_ids))), thinking),
        )
        return Job(request, stream, self.engine.target.row_invariance.exact, thinking=thinking)

    def _constraint(
        self, params: SamplingParams, ends: tuple[int, ...], thinking: Thinking | None
    ) -> Constraint | None:
        """What holds the output to the form that was asked for; compiled here, in the caller's time."""
        if params.structured is None:
            return None
        if self.grammars is None:
            raise RequestError("structured output needs a tokenizer; pass one to LLM")
        ends = ends or params.stop_token_ids
        answer = self.grammars.constraint(Structured.of(params.structured), ends)
        return answer if thinking is None else AfterThinking(answer, thinking, ends, self.vocab_size)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises RequestError where it is empty, too long or has ids outside the vocabulary."""
        if isinstance(prompt, str):
            ids = encode_text(self.tokenizer, prompt)
        else:
            if isinstance(prompt, bytes | bytearray):
                raise RequestError(f"the prompt {bytes(prompt)!r} is bytes; give text: prompt.decode()")
            try:
                ids = [_id(i) for i in prompt]
            except TypeError:
                known = "give one text, or one list of token ids"
                raise RequestError(f"the prompt {prompt!r} is not usable; {known}") from None
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        longest = self.engine.max_model_len
        if len(ids) >= longest:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, and the context of {longest} leaves no room for output; "
                f"shorten the prompt to at most {longest - 1} tokens"
            )
        outside = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if outside is not None:
            raise RequestError(f"token id {outside} is outside the vocabulary of {self.vocab_size}")
        return ids

    def _check_draft_length(self, num_draft_tokens: int | None) -> None:
        most = self.engine.target.row_invariance.max_draft_tokens
        if num_draft_tokens is not None and not is_whole(num_draft_tokens, 0, most):
            raise RequestError(
                f"num_draft_tokens={num_draft_tokens!r} is not usable; it must be whole and in [0, {most}], the widest "
                "pass that was probed to be exact"
            )

    def _steady_drafter(self, params: SamplingParams, num_draft_tokens: int | None) -> str | None:
        """Rejection sampling repeats a seed's text only where the same drafter drafts in each step, equally far."""
        repeats = params.verifier == "rejection" and not params.greedy and num_draft_tokens
        return self.engine.drafter.steady if repeats and isinstance(self.engine.drafter, Several) else None

    def _check_ids(self, params: SamplingParams) -> None:
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            outside = [token for token in ids if not 0 <= token < self.vocab_size]
            if outside:
                most = self.vocab_size - 1
                raise RequestError(f"{name} names tokens {outside}; this vocabulary has ids 0 to {most}")


@contextmanager
def _which(index: int | None) -> Iterator[None]:
    """An error about one of several prompts says which."""
    try:
        yield
    except RequestError as error:
        if index is None:
            raise
        raise type(error)(f"prompts[{index}]: {error}") from error


def _id(token: Any) -> int:
    """A token id. Raises TypeError for what is none, True among it."""
    if isinstance(token, bool):
        raise TypeError
    return operator.index(token)


def _never(token_id: int) -> bool:
    return False


def _eos_ids(*sources: object) -> set[int]:
    """Every id that ends a text, of the configuration, the generation configuration and the tokenizer."""
    found: set[int] = set()
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return found
