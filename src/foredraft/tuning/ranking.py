"""What came of a tuning run: a row for each drafter, the recommendation, and what speaks against trusting them.

Plain data; knows nothing of how it is found or shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from foredraft.drafters.vocabulary import Overlap
from foredraft.models.base import SkipSet
from foredraft.profile import Profile
from foredraft.tuning.confirm import Confirmation
from foredraft.tuning.costs import Costs
from foredraft.tuning.forecast import Forecast
from foredraft.tuning.machine import UNWATCHED, Load
from foredraft.tuning.options import TuneOptions
from foredraft.tuning.search import Trial

WORTH = 1.02  # speed-ups are told apart from here on
APART = 1.25  # prediction over measurement, or the other way round: beyond this one of them is wrong


@dataclass(frozen=True, slots=True)
class Translated:
    """What a drafter with tokens of its own shares with the target, and what it would give if drafting were free."""

    overlap: Overlap
    at_best: float  # speed-up, predicted


@dataclass(frozen=True, slots=True)
class Row:
    """A drafter that could serve: acceptance, price, what that should give, and what it gave."""

    name: str
    alpha: float
    cost_ratio: float  # a draft token's price in plain steps
    forecast: Forecast
    memory: int  # bytes beside the target
    skip: SkipSet | None = None
    measured: Confirmation | None = None
    cost_error: float = 0.0  # relative, of the timings that the price comes from
    translated: Translated | None = None  # where the drafter has a vocabulary of its own

    @property
    def speedup(self) -> float:
        """Confirmation, where it was."""
        return self.measured.speedup if self.measured else self.forecast.speedup

    @property
    def disagrees(self) -> bool:
        """Whether prediction and measurement are more than a quarter apart."""
        if self.measured is None:
            return False
        ratio = self.measured.speedup / self.forecast.speedup
        return not 1 / APART <= ratio <= APART


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
    load: Load = UNWATCHED  # of the machine while speed-ups were confirmed

    @property
    def recommended(self) -> Row | None:
        best = max(self.rows, key=lambda row: row.speedup, default=None)
        if best is None or best.speedup < WORTH:
            return None
        near = [row for row in self.rows if row.speedup * WORTH >= best.speedup]
        return min(near, key=lambda row: (row.memory, -row.speedup))

    @property
    def busy(self) -> bool:
        """Whether something else used the machine while it was measured."""
        return self.costs.load.busy or self.load.busy

    @property
    def doubt(self) -> str | None:
        """Why the profile is not to be kept without a second thought; None where nothing speaks against it."""
        row = next((row for row in self.rows if row.skip is not None), None)
        if row is None:
            return None
        if row.measured is None:
            return f"{row.name} is predicted only, from costs of a busy machine" if self.busy else None
        if row.disagrees:
            predicted, measured = row.forecast.speedup, row.measured.speedup
            return f"{row.name} was predicted {predicted:.2f} and measured {measured:.2f}, more than a quarter apart"
        return None

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
            "busy": self.busy,
            "load": {"costs": self.costs.load.as_dict(), "confirmation": self.load.as_dict()},
            "doubt": self.doubt,
            "trials": {name: len(trials) for name, trials in self.trials.items()},
            "calibration_prompts": self.prompts[0],
            "held_out_prompts": self.prompts[1],
        }


def _row_dict(row: Row) -> dict[str, Any]:
    measured = row.measured and {
        name: getattr(row.measured, name) for name in ("speedup", "low", "high", "seconds", "equal", "rounds", "error")
    } | {"stats": row.measured.stats.as_dict()}
    return {
        "name": row.name,
        "alpha": row.alpha,
        "cost_ratio": row.cost_ratio,
        "cost_error": row.cost_error,
        "num_draft_tokens": row.forecast.gamma,
        "predicted": row.forecast.speedup,
        "by_length": list(row.forecast.by_length),
        "tokens_per_pass": row.forecast.tokens_per_pass,
        "memory": row.memory,
        "skip": row.skip and asdict(row.skip),
        "measured": measured,
        "disagrees": row.disagrees,
        "vocabulary": row.translated and row.translated.overlap.as_dict() | {"at_best": row.translated.at_best},
    }
