"""What steps, drafts and sub-layers cost on this machine: plain data, seconds, and how sure they are.

Knows nothing of how they are measured.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from foredraft.drafters.base import Drafter
from foredraft.policy import StepTimes
from foredraft.tuning.machine import UNWATCHED, Load


@dataclass(frozen=True, slots=True)
class DraftCost:
    """Seconds to draft: a fixed part, and so much for each token; and once a text, to read its prompt."""

    fixed: float
    token: float
    start: float = 0.0

    def seconds(self, tokens: int) -> float:
        return self.fixed + self.token * tokens if tokens else 0.0


@dataclass(frozen=True, slots=True)
class SublayerCosts:
    """Seconds of a self-draft: of each draft, of each token, and of each token and sub-layer that is not skipped."""

    fixed: float
    token: float
    attention: float
    mlp: float

    def draft(self, attentions: int, mlps: int) -> DraftCost:
        return DraftCost(self.fixed, self.token + attentions * self.attention + mlps * self.mlp)


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a step without its drafting, by tokens drafted (interpolated), and of reading a prompt."""

    lengths: tuple[int, ...]  # ascending, beginning with 0
    seconds: tuple[float, ...]
    prefill: float = 0.0  # all passes over a prompt, the mean of the calibration text
    around: float = 0.0  # from the end of one step to the beginning of the next

    def step(self, drafted: int) -> float:
        return float(np.interp(drafted, self.lengths, self.seconds))

    def whole(self, drafted: int) -> float:
        """A step and what is around it."""
        return self.step(drafted) + self.around


@dataclass(frozen=True, slots=True)
class Costs:
    """Everything that was measured. `drafts` by drafter, `sublayers` by the weights a self-draft runs on."""

    steps: StepCosts
    drafts: Mapping[str, DraftCost] = field(default_factory=dict)
    sublayers: Mapping[str, SublayerCosts] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)  # of each name's timings, relative; see `fitting.error`
    load: Load = UNWATCHED  # of the machine while they were measured

    def ratio(self, draft: DraftCost) -> float:
        """A draft token's price in plain steps: the c of the formulas."""
        return draft.token / self.steps.step(0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"load": self.load.as_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Costs":
        steps = data["steps"]
        return cls(
            StepCosts(tuple(steps["lengths"]), tuple(steps["seconds"]), steps["prefill"], steps.get("around", 0.0)),
            {name: DraftCost(**cost) for name, cost in data["drafts"].items()},
            {name: SublayerCosts(**cost) for name, cost in data["sublayers"].items()},
            dict(data.get("errors", {})),
            Load(data["load"]["others"], data["load"]["waited"]) if "load" in data else UNWATCHED,
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """A drafter at a draft length; for the fit, the weights it runs on and how many sub-layers it keeps."""

    name: str
    drafter: Drafter
    gamma: int
    weights: str = ""
    attentions: int = 0
    mlps: int = 0


@dataclass(frozen=True, slots=True)
class Timed:
    """One timed step, and in which turn it was."""

    turn: Turn
    times: StepTimes
    behind: int = 0  # tokens of the text that its drafter had not read; 0: all but the latest few


@dataclass(slots=True)
class Timings:
    """Everything that was timed: steps that count, first steps of a drafter in a text, what was around them."""

    steps: list[Timed] = field(default_factory=list)
    starts: list[Timed] = field(default_factory=list)
    prefills: list[tuple[int, float]] = field(default_factory=list)  # tokens of a prompt's last pass, its seconds
    around: list[float] = field(default_factory=list)  # seconds a step, of each text
