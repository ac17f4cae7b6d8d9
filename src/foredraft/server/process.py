"""A server as a process: listening, and an end that finishes or fails every request and never hangs.

At the first SIGTERM or Ctrl-C nothing new is taken; what runs has `shutdown_timeout` seconds to finish and is failed
then, each client told. A second signal ends the process at once.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from foredraft.errors import RequestError
from foredraft.server.logs import log
from foredraft.server.settings import Limits

LAST_WORDS = 5.0  # seconds for answers that say so, after requests were failed


def listen(host: str, port: int) -> socket.socket:
    """Raises RequestError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise RequestError(f"cannot listen on {host} port {port}: {error}; choose another --port or --host") from None
    sock.set_inheritable(False)
    return sock


def serve(app: FastAPI, sock: socket.socket, limits: Limits, listening: Callable[[], None]) -> None:
    """Serve until told to stop."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(limits.shutdown_timeout + LAST_WORDS),
        lifespan="on",
    )
    GracefulServer(config, app, limits, listening).run(sockets=[sock])


class GracefulServer(uvicorn.Server):
    """uvicorn's server, which tells the models when it is to end."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, limits: Limits, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._app = app
        self._limits = limits
        self._listening = listening
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            self._listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True  # without uvicorn's memory of the signal, which it would raise again at the end
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_end)

    def _begin_end(self) -> None:
        models = self._app.state.services.models
        models.stopping = True
        log("stopping", seconds=self._limits.shutdown_timeout)
        asyncio.get_running_loop().call_later(self._limits.shutdown_timeout, self._fail_rest)

    def _fail_rest(self) -> None:
        log("failing what still runs", level=logging.WARNING)
        self._app.state.services.models.stop_all()
