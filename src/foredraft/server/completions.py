"""`/v1/completions`: whole or streamed, of one prompt or of several."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from foredraft.server.answers import (
    Head,
    Json,
    asks,
    chunks,
    draft_info_of,
    draft_info_of_step,
    memory,
    new_head,
    note_usage,
    streamed,
    usage,
    whole,
)
from foredraft.server.errors import ApiError
from foredraft.server.schemas import CompletionRequest
from foredraft.server.service import Answer, Delta, Finished, Model
from foredraft.server.settings import Limits
from foredraft.server.streaming import EventStream
from foredraft.types import TokenLogprobs


async def complete(body: CompletionRequest, request: Request, uid: str, model: Model, limits: Limits) -> Response:
    """Go on from a prompt, or several. Raises ApiError, RequestError."""
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo with logprobs is not supported: prompts are not scored; drop one of them", "echo")
    prompts = body.prompts
    wanted = [replace(ask, memory=memory(request)) for ask in asks(body, model, limits, prompts)]
    opened = [_echo(prompt, model) if body.echo else "" for prompt in prompts for _ in range(body.n or 1)]
    details = bool(body.return_draft_info)
    prepared = await model.prepare(wanted)
    answer = model.submit(prepared, stream=bool(body.stream), details=details)
    if body.stream:
        return _stream(body, request, uid, model, answer, opened)
    finished = await whole(answer, request)
    note_usage(request, finished)
    choices = [_choice(i, opened[i], one, model, details=details) for i, one in enumerate(finished)]
    return JSONResponse(_head(uid).payload(choices) | {"usage": usage(finished, body.n or 1)})


def _head(uid: str) -> Head:
    return new_head("cmpl", "text_completion", uid)


def _echo(prompt: str | list[int], model: Model) -> str:
    return prompt if isinstance(prompt, str) else model.decode(prompt)


def _choice(index: int, opened: str, one: Finished, model: Model, *, details: bool) -> Json:
    choice: Json = {"index": index, "text": opened + one.text, "finish_reason": one.finish_reason, "logprobs": None}
    if one.logprobs:
        choice["logprobs"] = logprobs(one.logprobs, model, Offset())
    return choice | {"draft_info": draft_info_of(one)} if details else choice


def _stream(
    body: CompletionRequest, request: Request, uid: str, model: Model, answer: Answer, opened: Sequence[str]
) -> EventStream:
    head, offsets = _head(uid), [Offset() for _ in opened]
    rest: Json = {"usage": None} if body.include_usage else {}
    opening = [_opening(head, index, text) | rest for index, text in enumerate(opened) if text]

    def chunk(delta: Delta) -> Json:
        return _chunk(head, delta, model, offsets, body) | rest

    choices = (body.n or 1) if body.include_usage else None
    return streamed(answer, request, chunks(answer, request, opening, chunk, head, choices))


def _opening(head: Head, index: int, text: str) -> Json:
    return head.payload([{"index": index, "text": text, "finish_reason": None, "logprobs": None}])


def _chunk(head: Head, delta: Delta, model: Model, offsets: "list[Offset]", body: CompletionRequest) -> Json:
    choice: Json = {"index": delta.index, "text": delta.text, "finish_reason": delta.finish_reason, "logprobs": None}
    if delta.logprobs:
        choice["logprobs"] = logprobs(delta.logprobs, model, offsets[delta.index])
    if body.return_draft_info:
        choice["draft_info"] = draft_info_of_step(delta)
    return head.payload([choice])


@dataclass(slots=True)
class Offset:
    """Where in a text the next token begins."""

    value: int = field(default=0)


def logprobs(entries: Sequence[TokenLogprobs], model: Model, offset: Offset) -> Json:
    """The form of OpenAI's completions: four lists; `top_logprobs` maps texts, the likelier of two equal ones."""
    tokens, offsets, top = [], [], []
    for entry in entries:
        tokens.append(model.token(entry.token)[0])
        offsets.append(offset.value)
        offset.value += len(tokens[-1])
        likely: dict[str, float] = {}
        for token, logprob in entry.top:
            likely.setdefault(model.token(token)[0], max(logprob, -9999.0))
        top.append(likely)
    scores = [max(entry.logprob, -9999.0) for entry in entries]
    return {"tokens": tokens, "token_logprobs": scores, "top_logprobs": top, "text_offset": offsets}
