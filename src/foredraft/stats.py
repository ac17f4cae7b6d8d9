"""Counters of a request or of a whole engine, and the rates derived from them.

Owns the field's figures and their exact definitions. Knows nothing of models, tensors or clocks.
"""

from dataclasses import asdict, dataclass, field, fields


@dataclass(slots=True)
class SourceStats:
    """What one drafter did. Its seconds are those in which it was asked, whether its drafts were used or not."""

    drafts: int = 0  # passes that checked a draft of its
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0

    def add(self, other: "SourceStats") -> None:
        for spec in fields(self):
            setattr(self, spec.name, getattr(self, spec.name) + getattr(other, spec.name))


@dataclass(slots=True)
class SpecStats:
    """What speculation did. Times are seconds; a *pass* is one forward of the target that produced tokens."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    target_passes: int = 0
    drafts: int = 0  # passes that had at least one draft token to check
    drafted: int = 0
    accepted: int = 0
    drafted_at: list[int] = field(default_factory=list)  # [i]: drafts that reached position i
    accepted_at: list[int] = field(default_factory=list)  # [i]: of these, accepted at position i
    by_source: dict[str, SourceStats] = field(default_factory=dict)  # by drafter; "forced": what a grammar dictated
    seconds_drafting: float = 0.0
    seconds_verifying: float = 0.0  # forward passes of the target, prefill included
    seconds_other: float = 0.0
    seconds_to_first_token: float = 0.0
    seconds_total: float = 0.0

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted / drafted tokens (not alpha, which is per position and conditional on all before)."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per target pass, recovered and bonus tokens included."""
        return self.output_tokens / self.target_passes if self.target_passes else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the drafts that reached position i whose token there was accepted."""
        return [accepted / reached for accepted, reached in zip(self.accepted_at, self.drafted_at, strict=True)]

    @property
    def tokens_per_second(self) -> float:
        """Output tokens over the seconds from arrival to the end."""
        return self.output_tokens / self.seconds_total if self.seconds_total else 0.0

    def count_pass(self, drafted: int, accepted: int, emitted: int) -> None:
        """Record one pass: of `drafted` tokens `accepted` were right, and `emitted` tokens reached the user."""
        self.target_passes += 1
        self.drafts += drafted > 0
        self.drafted += drafted
        self.accepted += accepted
        self.output_tokens += emitted
        grow = drafted - len(self.drafted_at)
        if grow > 0:
            self.drafted_at += [0] * grow
            self.accepted_at += [0] * grow
        for i in range(drafted):
            self.drafted_at[i] += 1
        for i in range(accepted):
            self.accepted_at[i] += 1

    def source(self, name: str) -> SourceStats:
        """The counters of one drafter."""
        if name not in self.by_source:
            self.by_source[name] = SourceStats()
        return self.by_source[name]

    def add(self, other: "SpecStats") -> None:
        """Add another's counters to these; lists by position, the shorter one padded with zeros."""
        for spec in fields(self):
            mine, theirs = getattr(self, spec.name), getattr(other, spec.name)
            if isinstance(mine, dict):
                for name, counters in theirs.items():
                    self.source(name).add(counters)
            elif isinstance(mine, list):
                width = max(len(mine), len(theirs))
                padded = [xs + [0] * (width - len(xs)) for xs in (mine, theirs)]
                setattr(self, spec.name, [a + b for a, b in zip(*padded, strict=True)])
            else:
                setattr(self, spec.name, mine + theirs)

    def as_dict(self) -> dict[str, object]:
        """Counters and rates, ready for JSON."""
        counters: dict[str, object] = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        counters["by_source"] = {name: asdict(own) for name, own in self.by_source.items()}
        rates = ("draft_acceptance_rate", "mean_acceptance_length", "acceptance_by_position", "tokens_per_second")
        return counters | {name: getattr(self, name) for name in rates}
