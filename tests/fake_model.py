"""A model for servers under test, which answers without an engine."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from foredraft.server.service import Ask, Delta, Figures, Finished, ModelInfo, TokenPiece
from foredraft.stats import SpecStats


class FakeAnswer:
    def __init__(self, asks: Sequence[Ask]) -> None:
        stats = SpecStats(prompt_tokens=3)
        stats.count_pass(1, 1, 2)
        pieces = (TokenPiece(1, "o", "accepted", "fake"), TokenPiece(2, "k", "bonus", ""))
        one = Finished("ok", "stop", 3, 0, stats, 0.0, pieces)
        self.finished: list[Finished | None] = [one] * len(asks)

    async def deltas(self) -> AsyncIterator[Sequence[Delta]]:
        yield []
        yield [Delta(i, "ok", one.tokens, (), 1, 1, "stop") for i, one in enumerate(self.finished) if one is not None]

    async def wait(self) -> list[Finished]:
        await asyncio.sleep(0)
        return [one for one in self.finished if one is not None]

    def cancel(self) -> None: ...


class FakeModel:
    """Answers "ok" to everything."""

    info = ModelInfo(100, 4, "fake", ("fake",), True, "float32", "cpu", True, {}, 1000)

    async def prepare(self, asks: Sequence[Ask]) -> Sequence[Ask]:
        return asks

    def submit(self, asks: Sequence[Ask], *, stream: bool, details: bool) -> FakeAnswer:
        return FakeAnswer(asks)

    def encode(self, prompt: Any) -> list[int]:
        return [1, 2]

    def decode(self, ids: Sequence[int]) -> str:
        return "ok"

    def token(self, token_id: int) -> tuple[str, list[int] | None]:
        return "o", [111]

    def figures(self) -> Figures:
        return Figures(0, 0, 0.0)

    def stop_all(self) -> None: ...

    async def drained(self) -> None: ...

    def close(self) -> None: ...
