"""`/v1/chat/completions`: whole or streamed."""

from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from foredraft.server.answers import (
    Head,
    Json,
    asks,
    draft_info_of,
    draft_info_of_step,
    new_head,
    note_usage,
    usage,
    watched,
    whole,
)
from foredraft.server.schemas import ChatRequest
from foredraft.server.service import Answer, Delta, Finished, Model
from foredraft.server.settings import Limits
from foredraft.server.streaming import sse
from foredraft.types import TokenLogprobs


async def chat(body: ChatRequest, request: Request, uid: str, model: Model, limits: Limits) -> Response:
    """Answer a conversation. Raises ApiError, RequestError."""
    messages = [message.for_template() for message in body.messages]
    details = bool(body.return_draft_info)
    wanted = asks(body, model, limits, [messages])
    answer = model.submit(wanted, stream=bool(body.stream), details=details)
    if body.stream:
        return sse(_stream(body, request, uid, model, answer), request.state.request_id)
    finished = await whole(answer, request)
    note_usage(request, finished)
    head = new_head("chatcmpl", "chat.completion", uid)
    choices = [_choice(i, one, model, details=details) for i, one in enumerate(finished)]
    return JSONResponse(head.payload(choices) | {"usage": usage(finished, len(wanted))})


def _choice(index: int, one: Finished, model: Model, *, details: bool) -> Json:
    message = {"role": "assistant", "content": one.text, "refusal": None}
    choice: Json = {"index": index, "message": message, "finish_reason": one.finish_reason, "logprobs": None}
    if one.logprobs:
        choice["logprobs"] = logprobs(one.logprobs, model)
    return choice | {"draft_info": draft_info_of(one)} if details else choice


async def _stream(
    body: ChatRequest, request: Request, uid: str, model: Model, answer: Answer
) -> AsyncIterator[Json | None]:
    head = new_head("chatcmpl", "chat.completion.chunk", uid)
    rest: Json = {"usage": None} if body.include_usage else {}
    with watched(answer):
        for index in range(body.n or 1):
            opening = {"role": "assistant", "content": ""}
            yield head.payload([{"index": index, "delta": opening, "finish_reason": None, "logprobs": None}]) | rest
        async for delta in answer.deltas():
            yield None if delta is None else _chunk(head, delta, model, details=body.return_draft_info) | rest
        note_usage(request, answer.finished)
        if body.include_usage:
            yield head.payload([]) | {"usage": usage(answer.finished, body.n or 1)}


def _chunk(head: Head, delta: Delta, model: Model, *, details: bool | None) -> Json:
    content = {"content": delta.text} if delta.text else {}
    choice: Json = {"index": delta.index, "delta": content, "finish_reason": delta.finish_reason, "logprobs": None}
    if delta.logprobs:
        choice["logprobs"] = logprobs(delta.logprobs, model)
    if details:
        choice["draft_info"] = draft_info_of_step(delta)
    return head.payload([choice])


def logprobs(entries: Sequence[TokenLogprobs], model: Model) -> Json:
    return {"content": [_logprob(entry, model) for entry in entries], "refusal": None}


def _logprob(entry: TokenLogprobs, model: Model) -> Json:
    top = [_token(token, logprob, model) for token, logprob in entry.top]
    return _token(entry.token, entry.logprob, model) | {"top_logprobs": top}


def _token(token: int, logprob: float, model: Model) -> Json:
    text, raw = model.token(token)
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": raw}
