"""Which sequences run: admission, slots, and how much of a prompt a step computes. Knows nothing of tensors.

Prompts are cut into chunks at fixed positions, so that what a sequence computes never depends on who else is there.
"""

import heapq
from collections import deque

from foredraft.models.rows import PREFILL_CHUNK
from foredraft.types import Phase, Sequence


class Scheduler:
    """First come, first served, up to `max_batch_size` at once; a sequence keeps its slot until it ends."""

    def __init__(self, max_batch_size: int) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.free_slots = list(range(max_batch_size))

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def next_batch(self) -> list[Sequence]:
        """All that run, newcomers admitted while slots are free; the lowest slots first, so that a batch is dense."""
        while self.waiting and self.free_slots:
            sequence = self.waiting.popleft()
            sequence.slot = heapq.heappop(self.free_slots)
            sequence.phase = Phase.RUNNING
            self.running.append(sequence)
        return list(self.running)

    def retire(self, sequence: Sequence) -> None:
        """End a sequence, running or still waiting, and free its slot."""
        if sequence.phase is Phase.RUNNING:
            self.running.remove(sequence)
            heapq.heappush(self.free_slots, sequence.slot)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.phase = Phase.FINISHED


def chunk_end(sequence: Sequence) -> int:
    """Up to which token the next pass of a sequence reaches."""
    return min(len(sequence.token_ids), (sequence.cached // PREFILL_CHUNK + 1) * PREFILL_CHUNK)
