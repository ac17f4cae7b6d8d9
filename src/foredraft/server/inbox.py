"""From the engine's thread to the event loop: what steps gave, delivered with one wake-up for all that waits.

Knows nothing of what is delivered.
"""

import asyncio
from collections import deque
from collections.abc import Callable

Wake = Callable[[], None]


class Mail:
    """Wakes boxes of one event loop from other threads; many posts between two turns of the loop cost one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: deque[Wake] = deque()
        self._called = False

    def post(self, wake: Wake) -> None:
        """Have `wake` called on the loop soon. From any thread."""
        self._due.append(wake)
        if not self._called:
            self._called = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._due.clear()

    def _deliver(self) -> None:
        self._called = False  # before the boxes are looked at: what is posted now calls again
        while self._due:
            self._due.popleft()()


class Bell:
    """What one coroutine waits on."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiter: asyncio.Future[bool] | None = None

    def ring(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(True)

    async def wait(self, seconds: float | None = None) -> bool:
        """Whether it rang before the time was up."""
        self._waiter = self._loop.create_future()
        timer = None if seconds is None else self._loop.call_later(seconds, self._give_up, self._waiter)
        try:
            return await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    @staticmethod
    def _give_up(waiter: "asyncio.Future[bool]") -> None:
        if not waiter.done():
            waiter.set_result(False)
