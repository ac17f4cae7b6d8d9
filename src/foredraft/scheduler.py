"""Which requests run: admission, slots, and how much of a prompt a step computes. Knows nothing of tensors.

Prompts are cut into chunks at fixed positions, so that what a request computes never depends on who else is there.
"""

import heapq
from collections import deque

from foredraft.models.rows import PREFILL_CHUNK
from foredraft.types import Phase, Request

PREFILL_BUDGET = 2 * PREFILL_CHUNK  # tokens of prompts in one step, so that newcomers do not stall those that decode


class Scheduler:
    """First come, first served, up to `max_batch_size` at once; a request keeps its slot until it ends."""

    def __init__(self, max_batch_size: int, prefill_budget: int = PREFILL_BUDGET) -> None:
        self.prefill_budget = prefill_budget
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.free_slots = list(range(max_batch_size))

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def next_batch(self) -> list[Request]:
        """Whose turn it is: all that decode, and prompts in the order of arrival while the budget allows.

        Newcomers are admitted while slots are free, to the lowest ones first, so that a batch is dense.
        """
        while self.waiting and self.free_slots:
            self._admit(self.waiting.popleft())
        prompts = self._prompts()
        return [request for request in self.running if request.decoding or request in prompts]

    def _admit(self, request: Request) -> None:
        request.slot = heapq.heappop(self.free_slots)
        request.phase = Phase.RUNNING
        self.running.append(request)

    def _prompts(self) -> set[Request]:
        """Whose next chunk is computed in this step; the first to have come always, so that nobody starves."""
        chosen: set[Request] = set()
        used = 0
        for request in self.running:
            if not request.decoding:
                used += chunk_end(request) - request.cached
                if chosen and used > self.prefill_budget:
                    break
                chosen.add(request)
        return chosen

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
