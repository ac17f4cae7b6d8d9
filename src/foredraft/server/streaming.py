"""Server-sent events: JSON payloads in, bytes out, signs of life while nothing comes, errors in the stream.

Knows nothing of what the payloads mean.
"""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse

from foredraft.server.errors import as_api_error
from foredraft.server.logs import log

DONE = b"data: [DONE]\n\n"
ALIVE = b": alive\n\n"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies must not hold events back

Payload = Mapping[str, Any]


def event(payload: Payload) -> bytes:
    return (
        b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"
    )


def sse(payloads: AsyncIterator[Payload | None], request_id: str) -> StreamingResponse:
    """A response that streams these (None: a sign of life); whatever they raise becomes its last event."""
    return StreamingResponse(_events(payloads, request_id), media_type="text/event-stream", headers=HEADERS)


async def _events(payloads: AsyncIterator[Payload | None], request_id: str) -> AsyncIterator[bytes]:
    try:
        async for payload in payloads:
            yield event(payload) if payload is not None else ALIVE
    except Exception as error:
        log("stream failed", error=error, request_id=request_id)
        yield event(as_api_error(error).body())
        return
    yield DONE
