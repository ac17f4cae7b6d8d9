"""The models of a server, by uid: launching, states, the memory they may take together, draining and freeing.

Knows how to find, load and estimate a model only through what it is given. Runs on the event loop; loading and closing
happen on threads, one launch at a time.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from foredraft.client import USELESS
from foredraft.errors import ForedraftError
from foredraft.server.errors import ApiError, as_api_error, check_room
from foredraft.server.logs import log
from foredraft.server.service import Model
from foredraft.server.settings import Limits

State = Literal["waiting", "loading", "ready", "failed", "draining"]


class Spec(Protocol):
    """Of a launch; all that is known of it here is what clients call it."""

    @property
    def name(self) -> str: ...

    def as_named(self, message: str) -> str:
        """With the names that clients use, where they may not see the paths behind these."""
        ...


@dataclass(frozen=True, slots=True)
class Loader:
    """How specs become models. `footprint` and `load` block and run on a thread."""

    footprint: Callable[[Any], int]
    # spec, uid, the loop that will call it, bytes that it may take (None: no limit)
    load: Callable[[Any, str, asyncio.AbstractEventLoop, int | None], Model]


@dataclass(slots=True, eq=False)
class Entry:
    """A launched model, whatever became of it."""

    uid: str
    spec: Spec
    created: float = field(default_factory=time.time)
    state: State = "waiting"
    began: float = 0.0  # loading; monotonic
    seconds: float = 0.0  # that loading took
    bytes: int = 0  # without which it cannot load, estimated; then what it may come to take
    error: ApiError | None = None
    model: Model | None = None
    task: "asyncio.Task[None] | None" = None

    def describe(self) -> dict[str, Any]:
        """OpenAI's object, Xinference's fields, and ours."""
        info = self.model.info if self.model else None
        loading = time.monotonic() - self.began if self.state == "loading" else self.seconds
        return {
            "id": self.uid,
            "object": "model",
            "created": int(self.created),
            "owned_by": "foredraft",
            "state": self.state,
            "progress": {"stage": self.state, "seconds": round(loading, 3), "bytes": self.bytes},
            "error": self.error.message if self.error else None,
            "max_model_len": info.max_model_len if info else None,
            "max_batch_size": info.max_batch_size if info else None,
            "draft": info.drafter if info else None,
            "drafters": list(info.drafters) if info else None,
            "exact": info.exact if info else None,
            "dtype": info.dtype if info else None,
            "device": info.device if info else None,
            "memory": info.memory if info else None,
            "model_uid": self.uid,
            "model_type": "LLM",
            "model_name": self.spec.name,
            "model_format": "pytorch",
            "model_ability": ["generate", "chat"] if info and info.chat else ["generate"],
        }


class Models:
    """Every model that was launched and not deleted."""

    def __init__(self, loader: Loader, limits: Limits, budget: int | None) -> None:
        self._loader = loader
        self._limits = limits
        self._budget = budget
        self._entries: dict[str, Entry] = {}
        self._loading = asyncio.Lock()
        self.stopping = False

    # --- looking at them --------------------------------------------------------------------------------------------

    def list(self) -> list[Entry]:
        return list(self._entries.values())

    def entry(self, uid: str) -> Entry:
        """Whatever its state. Raises ApiError 404."""
        found = self._entries.get(uid)
        if found is None:
            known = ", ".join(entry.uid for entry in self._usable()) or "none"
            raise ApiError(404, f"no model {uid[:100]!r} here; there is {known}", "model", "model_not_found")
        return found

    def ready(self, uid: str | None) -> tuple[str, Model]:
        """The model that serves a request. Raises ApiError: none of that name, or not ready."""
        if self.stopping:
            raise ApiError(503, "the server is shutting down", code="stopping", headers={"Retry-After": "30"})
        entry = self._only() if uid is None else self.entry(uid)
        if entry.state == "failed":
            assert entry.error is not None
            raise ApiError(
                503, f"the model {entry.uid!r} failed to load: {entry.error.message}", "model", "model_failed"
            )
        if entry.model is None or entry.state != "ready":
            raise ApiError(
                503, f"the model {entry.uid!r} is {entry.state}", "model", "model_not_ready", {"Retry-After": "5"}
            )
        return entry.uid, entry.model

    def _usable(self) -> Sequence[Entry]:
        """Those that serve, or may come to."""
        return [entry for entry in self._entries.values() if entry.state not in USELESS]

    def _only(self) -> Entry:
        """The model of a request that names none."""
        if not self._entries:
            raise ApiError(400, "no model is launched; launch one by POST /v1/models or `foredraft launch`", "model")
        usable = self._usable()
        if not usable and len(self._entries) == 1:
            return next(iter(self._entries.values()))  # why it is of no use is told
        if len(usable) != 1:
            known = ", ".join(entry.uid for entry in usable) or "none that is usable: GET /v1/models tells why"
            raise ApiError(400, f"name a model in the field 'model'; there is {known}", "model")
        return usable[0]

    @property
    def all_ready(self) -> bool:
        states = [entry.state for entry in self._entries.values()]
        return (
            not self.stopping
            and bool(states)
            and "ready" in states
            and "loading" not in states
            and "waiting" not in states
        )

    # --- launching --------------------------------------------------------------------------------------------------

    def launch(self, spec: Spec, uid: str | None = None) -> Entry:
        """Begin to load a model. Raises ApiError: the uid is taken, or the server stops."""
        if self.stopping:
            raise ApiError(503, "the server is shutting down", code="stopping")
        uid = uid or f"{_slug(spec.name)}-{secrets.token_hex(3)}"
        taken = self._entries.get(uid)
        if taken is not None and taken.state != "failed":
            raise ApiError(409, f"a model {uid!r} is {taken.state} already; delete it, or choose another uid", "uid")
        entry = self._entries[uid] = Entry(uid, spec)
        entry.task = asyncio.get_running_loop().create_task(self._load(entry))
        return entry

    async def launched(self, entry: Entry) -> Entry:
        """Once it is ready. Raises what made it fail; it is forgotten then."""
        if entry.task is not None:
            await asyncio.shield(entry.task)
        if entry.error is not None:
            if self._entries.get(entry.uid) is entry:
                del self._entries[entry.uid]
            raise entry.error
        return entry

    async def _load(self, entry: Entry) -> None:
        async with self._loading:
            entry.state, entry.began = "loading", time.monotonic()
            try:
                entry.model = await self._fit(entry)
            except Exception as error:
                self._failed(entry, error)
            else:
                entry.seconds, entry.state = time.monotonic() - entry.began, "ready"
                log("model ready", model=entry.uid, seconds=round(entry.seconds, 2), bytes=entry.bytes)

    async def _fit(self, entry: Entry) -> Model:
        """Load it into what the others leave. Raises ApiError where it does not fit, by how much."""
        room, loop = self._room(entry), asyncio.get_running_loop()
        entry.bytes = await asyncio.to_thread(self._loader.footprint, entry.spec)
        if room is not None:
            check_room(entry.uid, entry.bytes, room)
        model = await asyncio.to_thread(self._loader.load, entry.spec, entry.uid, loop, room)
        entry.bytes = model.info.bytes
        return model

    def _failed(self, entry: Entry, error: Exception) -> None:
        entry.seconds, entry.state = time.monotonic() - entry.began, "failed"
        entry.error = as_api_error(error).with_traceback(None)  # which holds what was loaded
        trace, why = None, entry.error.message
        if not isinstance(error, ApiError | ForedraftError):
            trace, why = error, " ".join(str(error).split())[:1000]
            told = f"it could not be loaded ({type(error).__name__}); the server's log has the reason"
            entry.error = ApiError(500, told)
        entry.error.message = entry.spec.as_named(entry.error.message)
        log("model failed", level=logging.ERROR, error=trace, model=entry.uid, why=why)

    def _room(self, entry: Entry) -> int | None:
        """Bytes that the others leave of the budget."""
        if self._budget is None:
            return None
        others = (other.bytes for other in self._entries.values() if other is not entry and other.state != "failed")
        return max(0, self._budget - sum(others))

    # --- ending -----------------------------------------------------------------------------------------------------

    async def delete(self, uid: str) -> None:
        """Let a model's requests finish, up to a limit, then free it. Raises ApiError 404."""
        entry = self.entry(uid)
        if entry.state == "draining":
            raise ApiError(409, f"the model {uid!r} is being deleted already", "model")
        if entry.state in ("waiting", "loading"):
            assert entry.task is not None
            await asyncio.shield(entry.task)  # loading cannot be interrupted
        was, entry.state = entry.state, "draining"
        try:
            if was != "failed":
                await self._close(entry, self._limits.drain_timeout)
        finally:
            self._entries.pop(uid, None)
        log("model deleted", model=uid)

    async def _close(self, entry: Entry, seconds: float) -> None:
        model = entry.model
        if model is None:
            return
        try:
            await asyncio.wait_for(model.drained(), seconds)
        except TimeoutError:
            model.stop_all()
        await asyncio.to_thread(model.close)
        entry.model = None

    def stop_all(self) -> None:
        """Fail whatever still runs; each of its clients is told."""
        for entry in self._entries.values():
            if entry.model is not None:
                entry.model.stop_all()

    async def close(self) -> None:
        """The server ends: nothing runs on after this."""
        self.stopping = True
        self.stop_all()
        for entry in self.list():
            if entry.state == "ready":
                await self._close(entry, 5.0)
        self._entries.clear()


def _slug(name: str) -> str:
    """What a uid may be made of."""
    last = name.rstrip("/").rsplit("/", 1)[-1]
    kept = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in last)
    return kept[:60].lstrip("._-") or "model"
