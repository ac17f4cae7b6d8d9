"""Constraint: the seam for everything that decides, from the text so far, which tokens may come next."""

from collections.abc import Sequence
from typing import Protocol

import torch

Ids = Sequence[int]


class Constraint(Protocol):
    """Follows one request's output.

    A verification pass asks about several continuations at once, most of which the text may never take: what `masks`,
    `forced` and `allowed` look at leaves no trace, only `commit` moves on.
    """

    def masks(self, paths: Sequence[Ids]) -> torch.Tensor:
        """True where a token may not follow the committed output and then `paths[i]`. # [n, V] bool

        A row whose path is itself not allowed is all False: the text never gets there.
        """
        ...

    def forced(self, limit: int) -> tuple[int, ...]:
        """The next tokens, at most `limit`, as far as there is no choice about the text."""
        ...

    def allowed(self, tokens: Ids) -> int:
        """How many of these tokens, from the first, may come next."""
        ...

    def commit(self, tokens: Ids) -> None:
        """These tokens are part of the output now."""
        ...
