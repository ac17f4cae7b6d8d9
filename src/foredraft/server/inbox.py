"""From the engine's thread to the event loop: what steps gave, delivered on a beat, and at once where it is urgent.

To wake the loop costs the engine's thread more than a step's bookkeeping, so that it does so for first and last words
alone. Knows nothing of what is delivered.
"""

import asyncio
from collections import deque
from collections.abc import Callable

Wake = Callable[[], None]


class Mail:
    """Wakes boxes of one event loop from other threads; many posts between two turns of the loop cost one.

    Everything but `post` is called on the loop. `beat` counts up every `interval` seconds while somebody listens; with
    an interval of 0 everything is urgent.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self.beat = 0
        self.interval = interval
        self._loop = loop
        self._due: deque[Wake] = deque()
        self._called = False
        self._listeners = 0
        self._timer: asyncio.TimerHandle | None = None

    def post(self, wake: Wake, *, urgent: bool) -> None:
        """Have `wake` called on the loop: soon, or on the next beat. From any thread."""
        self._due.append(wake)
        if (urgent or not self.interval) and not self._called:
            self._called = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._due.clear()

    def listen(self) -> None:
        """One more listens, until `leave`."""
        self._listeners += 1
        if self._timer is None and self.interval:
            self._timer = self._loop.call_later(self.interval, self._strike)

    def leave(self) -> None:
        self._listeners -= 1
        if not self._listeners and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _strike(self) -> None:
        self.beat += 1
        self._timer = self._loop.call_later(self.interval, self._strike)
        self._deliver()

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
