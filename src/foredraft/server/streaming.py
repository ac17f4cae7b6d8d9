"""Server-sent events: JSON payloads in, bytes out, signs of life while nothing comes, errors in the stream.

Knows nothing of what the payloads mean.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.responses import StreamingResponse

from foredraft.server.errors import as_api_error
from foredraft.server.logs import log

DONE = b"data: [DONE]\n\n"
ALIVE = b": alive\n\n"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies must not hold events back

ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

Payloads = Sequence[Mapping[str, Any]]


def event(payload: Mapping[str, Any]) -> bytes:
    return f"data: {ENCODER.encode(payload)}\n\n".encode("utf-8", "replace")


def sse(payloads: AsyncIterator[Payloads], request_id: str) -> StreamingResponse:
    """A response that streams these (none: a sign of life); whatever they raise becomes its last event.

    What comes together goes out together: a write costs more than an event.
    """
    return StreamingResponse(_events(payloads, request_id), media_type="text/event-stream", headers=HEADERS)


async def _events(payloads: AsyncIterator[Payloads], request_id: str) -> AsyncIterator[bytes]:
    try:
        async for some in payloads:
            yield b"".join(map(event, some)) or ALIVE
    except Exception as error:
        log("stream failed", error=error, request_id=request_id)
        yield event(as_api_error(error).body())
        return
    yield DONE
