"""Which drafts would have been accepted on a text, and how many decoding steps that makes. Arithmetic only."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How many tokens of a draft would have been accepted, for a draft that begins after each output token.

    `runs[k][j]` is how many tokens of a draft that begins after j + 1 output tokens of sample k equal the target's own;
    `offered[k][j]` is the most that it would propose there (None: as many as it is asked for). `alpha` is
    E[sum min(p, q)] over positions, at temperature 0 the share of equal argmaxes. `depth` is the longest run that
    was looked at.
    """

    runs: tuple[tuple[int, ...], ...]
    alpha: float
    depth: int
    offered: tuple[tuple[int, ...], ...] | None = None

    @property
    def positions(self) -> int:
        return sum(map(len, self.runs))


@dataclass(frozen=True, slots=True)
class Rounds:
    """The decoding steps of all samples at one draft length: what `SpecStats` would have counted."""

    steps: dict[int, int]  # by tokens drafted
    tokens: int  # emitted by these steps
    drafted_at: tuple[int, ...]
    accepted_at: tuple[int, ...]

    @property
    def passes(self) -> int:
        return sum(self.steps.values())

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def draft_acceptance_rate(self) -> float:
        drafted = sum(self.drafted_at)
        return sum(self.accepted_at) / drafted if drafted else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of drafts that reached position i whose token there was accepted."""
        return [a / d for a, d in zip(self.accepted_at, self.drafted_at, strict=True) if d]


def run_lengths(agree: Iterable[Sequence[bool]]) -> tuple[tuple[int, ...], ...]:
    """From agreement at each position to the run of agreement that begins there."""
    return tuple(tuple(_runs(row)) for row in agree)


def _runs(agree: Sequence[bool]) -> list[int]:
    runs = [0] * len(agree)
    for j in reversed(range(len(agree))):
        runs[j] = 1 + (runs[j + 1] if j + 1 < len(agree) else 0) if agree[j] else 0
    return runs


def walk(acceptance: Acceptance, gamma: int, max_new_tokens: int | None = None) -> Rounds:
    """The steps in which the engine would decode every sample with drafts of `gamma` tokens.

    A sample of n + 1 output tokens gets its first one from the prompt and has n runs. A draft is never so long that
    its last token could not be emitted; `max_new_tokens` is the limit that the engine goes by (None: the sample's own
    length; a sample that ended earlier by itself was drafted past its end).
    """
    steps, tested, kept = Counter[int](), Counter[int](), Counter[int]()
    for k, runs in enumerate(acceptance.runs):
        most = len(runs) if max_new_tokens is None else max_new_tokens - 1
        offered = None if acceptance.offered is None else acceptance.offered[k]
        j = 0
        while j < len(runs):
            drafted = min(gamma, most - j - 1, gamma if offered is None else offered[j])
            accepted = min(runs[j], drafted)
            ended = accepted == len(runs) - j  # by a drafted token: what was drafted beyond it is never tested
            steps[drafted] += 1
            tested[accepted if ended else drafted] += 1
            kept[accepted] += 1
            j += accepted + 1
    return Rounds(dict(sorted(steps.items())), acceptance.positions, _reached(tested, gamma), _reached(kept, gamma))


def _reached(counts: Counter[int], gamma: int) -> tuple[int, ...]:
    """For each i below `gamma`: how many of the counted lengths are longer than i."""
    return tuple(sum(n for length, n in counts.items() if length > i) for i in range(gamma))
