"""`/v1/chat/completions`: whole or streamed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
from foredraft.server.schemas import ChatRequest
from foredraft.server.service import Answer, Delta, Finished, Model
from foredraft.server.settings import Limits
from foredraft.server.streaming import EventStream
from foredraft.server.tool_calls import Withheld, finish_reason, message
from foredraft.types import TokenLogprobs


async def chat(body: ChatRequest, request: Request, uid: str, model: Model, limits: Limits) -> Response:
    """Answer a conversation. Raises ApiError, RequestError."""
    check_template(uid, model)
    messages = [message.for_template() for message in body.messages]
    details = bool(body.return_draft_info)
    own = {**_tools(body), "memory": memory(request)}
    wanted = [replace(ask, **own) for ask in asks(body, model, limits, [messages])]
    prepared = await model.prepare(wanted)
    answer = model.submit(prepared, stream=bool(body.stream), details=details)
    if body.stream:
        return _stream(body, request, uid, model, answer)
    finished = await whole(answer, request)
    note_usage(request, finished)
    head = new_head("chatcmpl", "chat.completion", uid)
    choices = [_choice(i, one, model, details=details) for i, one in enumerate(finished)]
    return JSONResponse(head.payload(choices) | {"usage": usage(finished, len(wanted))})


def check_template(uid: str, model: Model) -> None:
    """Raises ApiError where a model cannot be given a chat."""
    if not model.info.chat:
        advice = "send the text itself as 'prompt' to /v1/completions, or launch a model that has one"
        raise ApiError(400, f"the model {uid!r} has no chat template; {advice}", "messages")


def _tools(body: ChatRequest) -> Json:
    choice = "auto" if body.tool_choice is None else body.tool_choice
    return {
        "tools": body.tools or (),
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "template_arguments": body.chat_template_kwargs,
    }


def _choice(index: int, one: Finished, model: Model, *, details: bool) -> Json:
    choice: Json = {"index": index, "message": message(one), "finish_reason": finish_reason(one), "logprobs": None}
    if one.logprobs:
        choice["logprobs"] = logprobs(one.logprobs, model)
    return choice | {"draft_info": draft_info_of(one)} if details else choice


def _stream(body: ChatRequest, request: Request, uid: str, model: Model, answer: Answer) -> EventStream:
    head, each = new_head("chatcmpl", "chat.completion.chunk", uid), body.n or 1
    rest: Json = {"usage": None} if body.include_usage else {}
    withheld = {index: Withheld() for index in range(each) if body.tools}
    made = Chunks(head, model, bool(body.return_draft_info), withheld)
    opening = [made.opening(index) | rest for index in range(each)]

    def chunk(delta: Delta) -> Json:
        return made.of(delta, answer.finished[delta.index]) | rest

    choices = each if body.include_usage else None
    return streamed(answer, request, chunks(answer, request, opening, chunk, head, choices))


@dataclass(frozen=True, slots=True)
class Chunks:
    """From deltas to a stream's chunks. `withheld` is there where the texts may be tool calls."""

    head: Head
    model: Model
    details: bool
    withheld: dict[int, Withheld]

    def opening(self, index: int) -> Json:
        delta = {"role": "assistant", "content": ""}
        return self.head.payload([{"index": index, "delta": delta, "finish_reason": None, "logprobs": None}])

    def of(self, delta: Delta, one: Finished | None) -> Json:
        """`one` is the whole text, with its last delta."""
        choice: Json = {"index": delta.index, "delta": self._delta(delta, one), "finish_reason": None, "logprobs": None}
        if delta.finish_reason and one is not None:
            choice["finish_reason"] = finish_reason(one)
        if delta.logprobs:
            choice["logprobs"] = logprobs(delta.logprobs, self.model)
        if self.details:
            choice["draft_info"] = draft_info_of_step(delta)
        return self.head.payload([choice])

    def _delta(self, delta: Delta, one: Finished | None) -> Json:
        thought: Json = {"reasoning_content": delta.reasoning} if delta.reasoning else {}
        withheld = self.withheld.get(delta.index)
        if withheld is None:
            return thought | ({"content": delta.text} if delta.text else {})
        shown = withheld.take(delta.text, calling=delta.calling)
        ending = withheld.ending(one) if delta.finish_reason and one is not None else {}
        content = shown + ending.get("content", "")
        return {**thought, **ending, **({"content": content} if content else {})}


def logprobs(entries: Sequence[TokenLogprobs], model: Model) -> Json:
    return {"content": [_logprob(entry, model) for entry in entries], "refusal": None}


def _logprob(entry: TokenLogprobs, model: Model) -> Json:
    top = [_token(token, logprob, model) for token, logprob in entry.top]
    return _token(entry.token, entry.logprob, model) | {"top_logprobs": top}


def _token(token: int, logprob: float, model: Model) -> Json:
    text, raw = model.token(token)
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": raw}
