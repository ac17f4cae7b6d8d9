"""Constraint: the seam for everything that decides, from the text so far, which tokens may come next."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

Ids = Sequence[int]
Bits = bytes  # a set of tokens: bit t % 8 of byte t // 8 stands for token t; ceil(V / 8) of them


def members(allowed: Bits) -> list[int]:
    """The tokens of a set, ascending."""
    found: list[int] = np.flatnonzero(np.unpackbits(np.frombuffer(allowed, np.uint8), bitorder="little")).tolist()
    return found


class Constraint(Protocol):
    """Follows one request's output.

    A verification pass asks about several continuations at once, most of which the text may never take: what
    `allowed_after`, `forced` and `allowed` look at leaves no trace, only `commit` moves on.
    """

    @property
    def dear(self) -> bool:
        """Whether looking ahead costs too much at the moment: the next token is decoded without a draft."""
        ...

    def allowed_after(self, paths: Sequence[Ids]) -> list[Bits]:
        """The tokens that may follow the committed output and then `paths[i]`. # n

        All of them after a path that is itself not allowed: the text never gets there.
        """
        ...

    def forced(self, limit: int) -> tuple[int, ...]:
        """The next tokens, at most `limit`, as far as there is no choice about the text."""
        ...

    def allowed(self, tokens: Ids) -> int:
        """How many of these tokens, from the first, the text could go on with.

        Those in the set of `allowed_after` do. Others may, where the same text can be spelled in other tokens:
        enough to cut a draft by, not to choose a token.
        """
        ...

    def commit(self, tokens: Ids) -> None:
        """These tokens are part of the output now."""
        ...
