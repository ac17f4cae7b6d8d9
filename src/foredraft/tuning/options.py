"""What is asked of a tuning run: what to try and how hard, and who is told how far it is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foredraft.drafters.listed import check_place
from foredraft.drafters.make import check_format
from foredraft.drafters.registry import drafting
from foredraft.errors import RequestError
from foredraft.tuning.confirm import ROUNDS


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """What to try, and how hard. Raises RequestError for values out of range."""

    drafts: tuple[str, ...] = ()  # draft models: folders or hub names
    without: tuple[str, ...] = ()  # drafters by name that are left out
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
    draft_weight_format: str | None = None  # of draft models: int8, int4, none; None: what suits each one's size

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("tokens", 4), ("trials", 0), ("seed", 0), ("confirmed", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name}={getattr(self, name)} is not usable; it must be {least} or more")
        if self.max_seconds < 0:
            raise RequestError(f"max_seconds={self.max_seconds} is not usable; it must be 0 or more")
        check_format(self.draft_weight_format)
        if self.draft_weight_format is not None and not self.drafts:
            given = f"draft_weight_format={self.draft_weight_format!r}"
            raise RequestError(f"{given} cannot be honoured: no draft model is named; name one, or leave it out")
        check_place(self.drafts, None, draft_weight_format=self.draft_weight_format)
        unknown = [name for name in self.without if name not in drafting()]
        if unknown:
            raise RequestError(f"without={unknown[0]!r} is not known; use one of {', '.join(drafting())}")


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who is told how far things are: a stage with its number of steps (0: not known), and each step."""

    stage: Callable[[str, int], None] = lambda name, total: None
    tick: Callable[[str], None] = lambda text: None
