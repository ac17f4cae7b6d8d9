"""What was asked of a tuning run, and what came of it: options, rows, the recommendation.

Plain data; knows nothing of how it is found or shown.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foredraft.errors import RequestError
from foredraft.models.base import SkipSet
from foredraft.profile import Profile
from foredraft.tuning.confirm import ROUNDS, Measured
from foredraft.tuning.costs import Costs
from foredraft.tuning.forecast import Forecast
from foredraft.tuning.search import Trial

NAMES = ("ngram", "int4", "int8", "skip", "int4+skip")
WORTH = 1.02  # speed-ups are told apart from here on


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """What to try, and how hard. Raises RequestError for values out of range."""

    drafts: tuple[str, ...] = ()  # draft models: folders or hub names
    without: tuple[str, ...] = ()
    calibration: Path | None = None
    prompts: int = 16
    tokens: int = 128
    temperature: float = 0.0
    trials: int = 400
    max_seconds: float = 240.0  # of searching, all in all
    seed: int = 0
    study: Path | None = None
    confirmed: int = 2  # sets of a search that are confirmed
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("tokens", 4), ("trials", 0), ("seed", 0), ("confirmed", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name}={getattr(self, name)} is not usable; it must be {least} or more")
        if self.max_seconds < 0:
            raise RequestError(f"max_seconds={self.max_seconds} is not usable; it must be 0 or more")
        unknown = [name for name in self.without if name not in NAMES]
        if unknown:
            raise RequestError(f"without={unknown[0]!r} is not known; use one of {', '.join(NAMES)}")


@dataclass(frozen=True, slots=True)
class Row:
    """A drafter that could serve: acceptance, price, what that should give, and what it gave."""

    name: str
    alpha: float
    cost_ratio: float  # a draft token's price in plain steps
    forecast: Forecast
    memory: int  # bytes beside the target
    skip: SkipSet | None = None
    measured: Measured | None = None

    @property
    def speedup(self) -> float:
        """Measured, where it was."""
        return self.measured.speedup if self.measured else self.forecast.speedup


@dataclass(frozen=True, slots=True)
class Advice:
    """All rows, the best first, and which to use (None: plain decoding)."""

    model: str
    rows: tuple[Row, ...]
    refused: Mapping[str, str]  # drafters that cannot serve, and why
    costs: Costs
    trials: Mapping[str, Sequence[Trial]]  # of each search, in the order they were made
    profile: Profile | None
    options: TuneOptions
    prompts: tuple[int, int]  # used for calibration, held out

    @property
    def recommended(self) -> Row | None:
        best = max(self.rows, key=lambda row: row.speedup, default=None)
        if best is None or best.speedup < WORTH:
            return None
        near = [row for row in self.rows if row.speedup * WORTH >= best.speedup]
        return min(near, key=lambda row: (row.memory, -row.speedup))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        best = self.recommended
        return {
            "model": self.model,
            "recommended": best and best.name,
            "num_draft_tokens": best and best.forecast.gamma,
            "rows": [_row_dict(row) for row in self.rows],
            "refused": dict(self.refused),
            "costs": self.costs.as_dict(),
            "trials": {name: len(trials) for name, trials in self.trials.items()},
            "calibration_prompts": self.prompts[0],
            "held_out_prompts": self.prompts[1],
        }


def _row_dict(row: Row) -> dict[str, Any]:
    measured = row.measured and {
        name: getattr(row.measured, name) for name in ("speedup", "low", "high", "seconds", "equal")
    } | {"stats": row.measured.stats.as_dict()}
    return {
        "name": row.name,
        "alpha": row.alpha,
        "cost_ratio": row.cost_ratio,
        "num_draft_tokens": row.forecast.gamma,
        "predicted": row.forecast.speedup,
        "by_length": list(row.forecast.by_length),
        "tokens_per_pass": row.forecast.tokens_per_pass,
        "memory": row.memory,
        "skip": row.skip and asdict(row.skip),
        "measured": measured,
    }


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who is told how far things are."""

    stage: Callable[[str, int], None] = lambda name, total: None
    tick: Callable[[str], None] = lambda text: None
