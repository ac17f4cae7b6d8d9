"""Drafter: the seam for everything that guesses tokens ahead.

A drafter may be as wrong as it likes: it changes how many tokens a pass yields, never which.
"""

from typing import Protocol, runtime_checkable

from foredraft.policy import DraftPolicy
from foredraft.types import Draft, Sequence, Verdict


@runtime_checkable
class Drafter(Protocol):
    """Proposes one draft for each sequence, at most `sequence.draft_limit` tokens long, empty where it has no guess.

    While drafting it asks `policy.go_on` after each token whether another one pays.
    """

    name: str

    def propose(self, sequences: list[Sequence], policy: DraftPolicy) -> list[Draft]: ...

    def observe(self, sequence: Sequence, verdict: Verdict) -> None: ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended; drop what was kept for it."""
        ...


class NoDrafter:
    """Plain decoding: an empty draft for everybody."""

    name = "none"

    def propose(self, sequences: list[Sequence], policy: DraftPolicy) -> list[Draft]:
        return [Draft()] * len(sequences)

    def observe(self, sequence: Sequence, verdict: Verdict) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        pass
