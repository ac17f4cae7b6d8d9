"""Fakes for tests: a model that is a table, drafters that are right or wrong on purpose, and a way to play requests.

The table model keeps what was written at which position, as a real cache does, so a wrong rewind shows.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

import torch
from transformers import LlamaConfig

from foredraft.engine import Engine
from foredraft.models.cache import SlotCache
from foredraft.models.rows import RowInvariance
from foredraft.types import Draft, Request, SamplingParams, Verdict


class TableModel:
    """Logits depend on the last two tokens at the positions before, read back from what was written."""

    def __init__(self, vocab_size: int = 8, seed: int = 0, scale: float = 1.5, max_positions: int = 512) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = scale * torch.randn(vocab_size + 1, vocab_size, vocab_size, generator=generator)
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.config = LlamaConfig(vocab_size=vocab_size)
        self.generation_config = None
        self.cache = SlotCache([], dtype=torch.float32, devices=[])
        self.row_invariance = RowInvariance(min_rows=4, key_multiple=128, max_rows=33)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.written: dict[tuple[int, int], int] = {}
        self.passes: list[int] = []  # rows of each pass

    @property
    def weight_bytes(self) -> int:
        return 0

    def forward(self, rows) -> torch.Tensor:
        self.written.update(zip(zip(rows.slots, rows.positions, strict=True), rows.tokens, strict=True))
        self.passes.append(len(rows.tokens))
        return torch.stack([self._row(rows.slots[r], rows.positions[r]) for r in rows.wanted] or [self.table[0, 0]])[
            : len(rows.wanted)
        ]

    def _row(self, slot: int, position: int) -> torch.Tensor:
        return self.logits(self.written.get((slot, position - 1), -1), self.written[slot, position])

    def logits(self, before: int, last: int) -> torch.Tensor:
        """# [V]; `before` is -1 where there is only one token"""
        return self.table[before, last]

    def next_logits(self, tokens: list[int]) -> torch.Tensor:
        return self.logits(tokens[-2] if len(tokens) > 1 else -1, tokens[-1])


class Recorder:
    """A model that remembers the logits of every position it computed, by request; the last write wins."""

    def __init__(self, model) -> None:
        self._model = model
        self._running: list[Request] = []
        self.logits: dict[Request, dict[int, torch.Tensor]] = defaultdict(dict)

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def watch(self, engine: Engine) -> None:
        self._running = engine.scheduler.running

    def forward(self, rows) -> torch.Tensor:
        logits = self._model.forward(rows)
        owner = {request.slot: request for request in self._running}
        for row, values in zip(rows.wanted, logits, strict=True):
            self.logits[owner[rows.slots[row]]][rows.positions[row]] = values
        return logits

    def committed(self, request: Request) -> torch.Tensor:
        """The logits that decided each output token. # [output tokens, V]"""
        positions = range(request.prompt_len - 1, len(request.token_ids) - 1)
        return torch.stack([self.logits[request][p] for p in positions])


class Scripted:
    """A drafter without memory that drafts nothing; a subclass says what to draft."""

    name = "scripted"

    def tokens(self, request: Request) -> list[int]:
        return []

    def propose(self, requests, policy) -> list[Draft]:
        return [Draft(tuple(self.tokens(s)[: s.draft_limit]), self.name) for s in requests]

    def observe(self, request: Request, verdict: Verdict) -> None:
        pass

    def forget(self, request: Request) -> None:
        pass


class Oracle(Scripted):
    """Knows each seed's whole text; where the text is over it goes on with junk."""

    name = "oracle"

    def __init__(self, texts: dict[int, list[int]]) -> None:
        self.texts = texts

    def tokens(self, request: Request) -> list[int]:
        return self.texts[request.seed][len(request.token_ids) :] + [0] * request.draft_limit


class Wrong(Oracle):
    """Right for a few tokens, a different few each time, and never after that."""

    name = "wrong"

    def __init__(self, texts: dict[int, list[int]], vocab_size: int) -> None:
        super().__init__(texts)
        self.vocab_size = vocab_size

    def tokens(self, request: Request) -> list[int]:
        right = len(request.token_ids) % 3
        truth = super().tokens(request)
        return truth[:right] + [(token + 1) % self.vocab_size for token in truth[right:]]


class RandomDrafter(Scripted):
    """Any tokens, of any length."""

    name = "random"

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self.vocab_size, self.random = vocab_size, Random(seed)

    def tokens(self, request: Request) -> list[int]:
        length = self.random.randint(0, request.draft_limit)
        return [self.random.randrange(self.vocab_size) for _ in range(length)]


@dataclass(frozen=True)
class Ask:
    """A request to play: which prompt, when it comes, when its user walks away."""

    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    num_draft_tokens: int | None = None
    arrives: int = 0
    leaves: int | None = None  # aborted before this step
    stop_token_ids: frozenset[int] = frozenset()
    memory: str | None = ""


def new_request(ask: Ask, stop_rule=lambda token: False) -> Request:
    return Request(
        list(ask.prompt),
        ask.params,
        seed=ask.seed,
        stop_rule=stop_rule,
        num_draft_tokens=ask.num_draft_tokens,
        stop_token_ids=ask.stop_token_ids,
        memory=ask.memory,
    )


def play(engine: Engine, asks: Iterable[Ask]) -> list[Request]:
    """Run requests to their ends through `add`, `step` and `abort`."""
    requests = [(ask, new_request(ask)) for ask in asks]
    step = 0
    while engine.has_work or any(ask.arrives >= step for ask, _ in requests):
        for ask, request in requests:
            if ask.arrives == step:
                engine.add(request)
            if ask.leaves == step:
                engine.abort(request)
        if engine.has_work:
            engine.step()
        step += 1
    return [request for _, request in requests]
