"""What every request passes before a handler: host, key, size and pace of the body; and the line in the log after it.

Plain ASGI, so that streams flow through and a client that leaves is noticed. Knows nothing of handlers.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from foredraft.server.auth import Keys
from foredraft.server.errors import ApiError, as_api_error
from foredraft.server.logs import log
from foredraft.server.settings import Limits

Scope = MutableMapping[str, Any]
ASGIMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/ready", "/favicon.ico", "/openapi.json", "/v1/cluster/auth")  # asked for without a key
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
STUCK = 30.0  # seconds past its limit after which a request whose client reads nothing is cut off
QUIET = ("/health", "/ready", "/metrics")


@dataclass(slots=True)
class Guard:
    """Outermost but for nothing: gives each request an id, lets it in or not, and logs how it ended."""

    app: App
    keys: Keys
    limits: Limits
    hosts: tuple[str, ...]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        state = scope.setdefault("state", {})
        state["request_id"], state["facts"] = _request_id(scope), {}
        header = (b"x-request-id", state["request_id"].encode())
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope  # uvicorn leaves the body out

        async def answer(message: ASGIMessage) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        try:
            await self._admit(asked, receive, answer)
        except asyncio.CancelledError:
            state["facts"]["gone"] = True
            raise
        except Exception as error:
            log("failed", level=logging.ERROR, error=error, request_id=state["request_id"], path=scope["path"])
            if status == 0:
                await _respond(as_api_error(error), scope, receive, answer)
        finally:
            if scope["path"] not in QUIET or status >= 400:
                self._log(scope, status, began)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            self._check_host(headers.get(b"host", b"").decode("latin-1"))
            scope["state"]["key"] = None
            if scope["path"] not in OPEN and not scope["path"].startswith("/playground/"):
                scope["state"]["key"] = self.keys.check(headers.get(b"authorization", b"").decode("latin-1") or None)
            _check_encoding(headers.get(b"content-encoding", b"identity"))
            body = await read_body(receive, self.limits, headers.get(b"content-length"))
        except ApiError as error:
            await _respond(error, scope, receive, send)
        except Gone:
            scope["state"]["facts"]["gone"] = True
        else:
            await self._in_time(scope, replayed(body, receive), send)

    async def _in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError where it takes too long."""
        seconds = self.limits.request_timeout + STUCK
        try:
            async with asyncio.timeout(seconds):
                await self.app(scope, receive, send)
        except TimeoutError:
            message = f"no answer within {seconds:g} s; a launch goes on all the same, GET /v1/models tells its state"
            raise ApiError(504, message, code="timeout") from None

    def _check_host(self, host: str) -> None:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.hosts and name.lower() not in self.hosts:
            message = f"this server is not {name!r}; ask it by {', '.join(self.hosts)}, or start it with --allowed-host"
            raise ApiError(421, message)

    def _log(self, scope: Scope, status: int, began: float) -> None:
        state = scope["state"]
        key = state.get("key")
        log(
            "request",
            request_id=state["request_id"],
            method=scope["method"],
            path=scope["path"],
            status=status,
            seconds=round(time.perf_counter() - began, 4),
            key=key.name if key else None,
            **state["facts"],
        )


class Gone(Exception):
    """The client left before its body was whole."""


async def read_body(receive: Receive, limits: Limits, length: bytes | None) -> bytes:
    """The whole body. Raises ApiError where it is too long (at once where its length is told) or too slow."""
    if length is not None and (not length.isdigit() or int(length) > limits.max_body):
        raise _too_long(limits)
    parts, size, more = [], 0, True
    try:
        async with asyncio.timeout(limits.body_timeout):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                parts.append(message.get("body", b""))
                size, more = size + len(parts[-1]), message.get("more_body", False)
                if size > limits.max_body:
                    raise _too_long(limits)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.body_timeout:g} s") from None
    return b"".join(parts)


def _check_encoding(name: bytes) -> None:
    if name.lower() != b"identity":
        raise ApiError(415, f"the body is encoded as {name.decode('latin-1')!r}; send it as it is")


def _too_long(limits: Limits) -> ApiError:
    return ApiError(413, f"the body is over this server's limit of {limits.max_body} bytes")


def replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` for a body that was read already."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> ASGIMessage:
        return messages.pop() if messages else await receive()

    return again


async def gone(request: Request) -> None:
    """Returns when the client has left; to be used once the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return given if SAFE_ID.fullmatch(given) else secrets.token_hex(12)


async def _respond(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    headers = {**error.headers, "Connection": "close"} if error.status in (408, 413) else error.headers
    await JSONResponse(error.body(), error.status, headers)(scope, receive, send)
