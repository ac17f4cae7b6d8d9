"""Which requests run: admission, slots, and how much of a prompt a step computes. Knows nothing of tensors.

Prompts are cut into chunks at fixed positions, so that what a request computes never depends on who else is there;
where cuts change no bits, chunks are cut further while others decode.
"""

import heapq
from collections import deque
from collections.abc import Callable

from foredraft.models.rows import PREFILL_CHUNK
from foredraft.types import Phase, Request

PREFILL_BUDGET = 2 * PREFILL_CHUNK  # tokens of prompts in one step, so that newcomers do not stall those that decode
PIECE = 4  # tokens of which a cut chunk ends at a multiple
LEAST = 8  # tokens that a chunk is cut to
SHORT = 32  # tokens that are read at once: in pieces, prompts that come together would begin one after the other


class Scheduler:
    """First come, first served, up to `max_batch_size` at once; a request keeps its slot until it ends."""

    def __init__(
        self,
        max_batch_size: int,
        prefill_budget: int = PREFILL_BUDGET,
        fits: Callable[[list[Request], Request], bool] = lambda running, request: True,
    ) -> None:
        self.prefill_budget = prefill_budget
        self.budget_beside = prefill_budget  # the same where somebody decodes
        self.fits = fits
        self.cuts = False  # may chunks end anywhere?
        self.page = 0  # tokens that a prompt takes over at once where another one has computed them; 0: it never does
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.free_slots = list(range(max_batch_size))

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def next_batch(self) -> list[Request]:
        """Whose turn it is: all who decode, and prompts in the order of arrival while the budget allows."""
        prompts = self._prompts()
        return [request for request in self.running if request.decoding or request in prompts]

    def admit(self) -> bool:
        """Let newcomers in while slots are free and they fit, to the lowest slots first, so that a batch is dense.

        Who does not fit waits, and all behind it. Returns whether anybody came in.
        """
        before = len(self.running)
        while self.waiting and self.free_slots and self.fits(self.running, self.waiting[0]):
            request = self.waiting.popleft()
            request.slot = heapq.heappop(self.free_slots)
            request.phase = Phase.RUNNING
            self.running.append(request)
        return len(self.running) > before

    def _prompts(self) -> set[Request]:
        """Whose next chunk is computed in this step, up to its `reach`; the first to have come always has one.

        Who could take its next page over from another that computes it now waits for that.
        """
        chosen: set[Request] = set()
        beside = any(request.decoding for request in self.running)
        left = self.prefill_budget if not beside else max(self.budget_beside, self._least())
        for request in self.running:
            if request.decoding or any(self._computes_for(other, request) for other in chosen):
                continue
            reach = chunk_end(request)
            if beside and self.cuts:
                reach = min(reach, (request.cached + left) // PIECE * PIECE)
            count, rest = reach - request.cached, len(request.token_ids) - request.cached
            if chosen and (not 0 < count <= left or count < rest <= SHORT):
                break
            request.reach = reach
            chosen.add(request)
            left -= count
        return chosen

    def _least(self) -> int:
        """Tokens of prompts that a step computes at least: as many as a short one has, where such a one is next."""
        first = next((request for request in self.running if not request.decoding), None)
        if first is None or first.reach > 0 or len(first.token_ids) - first.cached > SHORT:
            return LEAST
        return SHORT

    def _computes_for(self, other: Request, request: Request) -> bool:
        """Whether another's next chunk has the next page of a request's prompt."""
        start, end = request.cached, request.cached + self.page
        return (
            self.page > 0
            and start % self.page == 0
            and other.cached < end
            and request.memory is not None
            and other.memory == request.memory
            and end < len(request.token_ids)
            and end <= chunk_end(other)
            and other.token_ids[:end] == request.token_ids[:end]
        )

    def retire(self, request: Request) -> None:
        """End a request, running or still waiting, and free its slot."""
        if request.phase is Phase.RUNNING:
            self.running.remove(request)
            heapq.heappush(self.free_slots, request.slot)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.phase = Phase.FINISHED


def chunk_end(request: Request) -> int:
    """Up to which token of a prompt a pass may reach."""
    return min(len(request.token_ids), (request.cached // PREFILL_CHUNK + 1) * PREFILL_CHUNK)
