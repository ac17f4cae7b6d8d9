"""What chats and completions have in common: from a body to what is asked of a model, and from texts to usage.

Knows schemas and the service protocol, nothing of engines.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from foredraft.server.auth import ANYBODY, Key
from foredraft.server.errors import ApiError
from foredraft.server.middleware import gone
from foredraft.server.sampling_params import Drafting, sampling_params
from foredraft.server.schemas import Generate
from foredraft.server.service import Answer, Ask, Delta, Finished, Messages, Model, TokenPiece
from foredraft.server.settings import Limits
from foredraft.server.streaming import END, EventStream, Payloads
from foredraft.stats import SpecStats
from foredraft.versions import installed

Json = dict[str, Any]
FINGERPRINT = f"foredraft-{installed('foredraft')}"


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer begins with."""

    id: str
    object: str
    created: int
    model: str

    def payload(self, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        }


def new_head(prefix: str, kind: str, uid: str) -> Head:
    return Head(f"{prefix}-{secrets.token_hex(14)}", kind, int(time.time()), uid)


def asks(body: Generate, model: Model, limits: Limits, texts: Sequence[str | list[int] | Messages]) -> list[Ask]:
    """What to generate: for each prompt, or chat, its choices. Raises ApiError, RequestError."""
    each = body.n or 1
    if each * len(texts) > limits.max_choices:
        raise ApiError(400, f"{each * len(texts)} texts in one request; this server allows {limits.max_choices}", "n")
    params = sampling_params(body, limits, longest=model.info.max_model_len)
    if params.seed is not None and params.seed + each > 2**63:
        raise ApiError(400, f"seed={params.seed} leaves no room for n={each} choices; give a smaller one", "seed")
    drafting = Drafting.of(body, model.info.drafters)
    own = [params if params.seed is None else replace(params, seed=params.seed + i) for i in range(each)]
    return [_ask(text, one, drafting) for text in texts for one in own]


def _ask(text: str | list[int] | Messages, params: Any, drafting: Drafting) -> Ask:
    chat = not isinstance(text, str) and len(text) > 0 and not isinstance(text[0], int)
    asked = {"messages" if chat else "prompt": text, "num_draft_tokens": drafting.length, "draft": drafting.drafter}
    return Ask(params, **asked)  # type: ignore[arg-type]


def memory(request: Request) -> str | None:
    """Whose outputs help to draft, and whose keys and values are shared: a key's own; nobody's where none is asked."""
    key: Key | None = request.state.key
    return None if key is None or key is ANYBODY else f"key {key.name}"


async def whole(answer: Answer, request: Request) -> list[Finished]:
    """The finished texts. Raises what made one of them fail, and ApiError where the client has left."""
    waiting, leaving = asyncio.ensure_future(answer.wait()), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        request.state.facts["gone"] = True
        raise ApiError(499, "the client has left")
    finally:
        waiting.cancel()
        leaving.cancel()
        answer.cancel()


def streamed(answer: Answer, request: Request, payloads: AsyncGenerator[Payloads, None]) -> EventStream:
    """A response of these. Whatever ends it, nothing of it goes on in the engine."""

    def left() -> None:  # the texts end, and with them the stream
        request.state.facts["gone"] = True
        answer.cancel()

    return EventStream(payloads, request.state.request_id, left=left, ended=answer.cancel)


async def chunks(
    answer: Answer,
    request: Request,
    opening: list[Json],
    chunk: Callable[[Delta], Json],
    head: Head,
    choices: int | None,
) -> AsyncGenerator[Payloads, None]:
    """A stream's payloads. With the last deltas comes what closes it: usage, unless `choices` (a prompt) is None."""
    if opening:
        yield opening
    left = len(answer.finished)
    async for deltas in answer.deltas():
        left -= sum(delta.finish_reason is not None for delta in deltas)
        payloads: list[Mapping[str, Any]] = [chunk(delta) for delta in deltas]
        if not left:
            note_usage(request, answer.finished)
            if choices is not None:
                payloads.append(head.payload([]) | {"usage": usage(answer.finished, choices)})
            payloads.append(END)
        yield payloads


def usage(finished: Sequence[Finished | None], choices: int) -> Json:
    """Tokens, and what speculation did, of all texts of a request; a prompt counts once however many choices it has."""
    ended = [one for one in finished if one is not None]
    total = SpecStats()
    for one in ended:
        total.add(one.stats)
    prompt = sum(one.prompt_tokens for one in ended[::choices])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": total.output_tokens,
        "total_tokens": prompt + total.output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(one.stats.prefix_tokens for one in ended[::choices])},
        "speculative_decoding": {
            "num_spec_steps": total.drafts,
            "num_target_passes": total.target_passes,
            "num_draft_tokens": total.drafted,
            "num_accepted_draft_tokens": total.accepted,
            "draft_acceptance_rate": round(total.draft_acceptance_rate, 4),
            "mean_acceptance_length": round(total.mean_acceptance_length, 4),
            "num_draft_tokens_per_pos": total.drafted_at,
            "num_accepted_tokens_per_pos": total.accepted_at,
            **_seconds(ended),
        },
    }


def _seconds(ended: Sequence[Finished]) -> Json:
    """Of the slowest text."""
    return {
        "queue_seconds": round(max((one.queued for one in ended), default=0.0), 6),
        "time_to_first_token_seconds": round(max((one.stats.seconds_to_first_token for one in ended), default=0.0), 6),
        "total_seconds": round(max((one.stats.seconds_total for one in ended), default=0.0), 6),
    }


def note_usage(request: Request, finished: Sequence[Finished | None]) -> None:
    """For the log's line."""
    ended = [one for one in finished if one is not None]
    request.state.facts |= {
        "prompt_tokens": sum(one.prompt_tokens for one in ended),
        "completion_tokens": sum(one.stats.output_tokens for one in ended),
        "finish_reasons": [one.finish_reason for one in ended],
    }


def draft_info(tokens: Sequence[TokenPiece], drafted: int, accepted: int) -> Json:
    listed = [{"id": token.id, "text": token.text, "kind": token.kind, "drafter": token.drafter} for token in tokens]
    return {"drafted": drafted, "accepted": accepted, "tokens": listed}


def draft_info_of(one: Finished) -> Json:
    return draft_info(one.tokens, one.stats.drafted, one.stats.accepted)


def draft_info_of_step(delta: Delta) -> Json:
    return draft_info(delta.tokens, delta.drafted, delta.accepted)
