"""Which requests run: admission, slots, and how much of a prompt a step computes. Knows nothing of tensors.

Prompts are cut into chunks at fixed positions, so that what a request computes never depends on who else is there.
"""

import heapq
from collections import deque

from foredraft.models.rows import PREFILL_CHUNK
from foredraft.types import Phase, Request


class Scheduler:
    """First come, first served, up to `max_batch_size` at once; a request keeps its slot until it ends."""

    def __init__(self, max_batch_size: int) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.free_slots = list(range(max_batch_size))

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def next_batch(self) -> list[Request]:
        """All that run, newcomers admitted while slots are free; the lowest slots first, so that a batch is dense."""
        while self.waiting and self.free_slots:
            request = self.waiting.popleft()
            request.slot = heapq.heappop(self.free_slots)
            request.phase = Phase.RUNNING
            self.running.append(request)
        return list(self.running)

    def retire(self, request: Request) -> None:
        """End a request, running or still waiting, and free its slot."""
        if request.phase is Phase.RUNNING:
            self.running.remove(request)
            heapq.heappush(self.free_slots, request.slot)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.phase = Phase.FINISHED


def chunk_end(request: Request) -> int:
    """Up to which token the next pass of a request reaches."""
    return min(len(request.token_ids), (request.cached // PREFILL_CHUNK + 1) * PREFILL_CHUNK)
