"""Server-sent events: JSON payloads in, bytes out, signs of life while nothing comes, errors in the stream.

Knows nothing of what the payloads mean.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from foredraft.server.errors import as_api_error
from foredraft.server.logs import log

END: Final[Mapping[str, Any]] = {}  # a stream's last payload
DONE = b"data: [DONE]\n\n"
ALIVE = b": alive\n\n"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies must not hold events back

ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

Payloads = Sequence[Mapping[str, Any]]


def event(payload: Mapping[str, Any]) -> bytes:
    return DONE if payload is END else f"data: {ENCODER.encode(payload)}\n\n".encode("utf-8", "replace")


class EventStream(Response):
    """Streams payloads up to END (none: a sign of life); whatever they raise becomes the last event.

    What comes together goes out together: a write costs more than an event. Starlette's own streams have a group of
    tasks each, which costs as much as all events of a short text; this one has a single listener, and a client that
    leaves is none of its errors: `left` is called, and should make the payloads end. `ended` is called in any case.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        payloads: AsyncGenerator[Payloads, None],
        request_id: str,
        *,
        left: Callable[[], object],
        ended: Callable[[], object],
    ) -> None:  # without Response's own, which is for a body that is there
        self.status_code, self.background = 200, None
        self._payloads, self._request_id = payloads, request_id
        self._left, self._ended = left, ended
        self.init_headers(HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        listening = asyncio.ensure_future(self._listen(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._payloads):
                await self._speak(send)
        finally:
            listening.cancel()
            self._ended()

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._left()

    async def _speak(self, send: Send) -> None:
        try:
            async for some in self._payloads:
                body, more = b"".join(map(event, some)) or ALIVE, not (some and some[-1] is END)
                await send({"type": "http.response.body", "body": body, "more_body": more})
                if not more:
                    return
        except Exception as error:
            log("stream failed", error=error, request_id=self._request_id)
            body = event(as_api_error(error).body())
            await send({"type": "http.response.body", "body": body, "more_body": False})
