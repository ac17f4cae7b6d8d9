"""All that came of a run, ready for JSON. Names neither the machine nor its user nor a path."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from foredraft.bench.figures import ArmFigures
from foredraft.bench.measure import PLAIN, Difference
from foredraft.bench.options import BenchOptions
from foredraft.bench.prediction import Prediction
from foredraft.bench.quality import PassRates, Rouge
from foredraft.diagnosis.setting import Setting
from foredraft.tuning.machine import Load

Timeline = Mapping[str, tuple[tuple[float, int], ...]]


@dataclass(frozen=True, slots=True)
class Counts:
    tasks: int
    requests: int
    rounds: int  # those that every request has
    tokens: int  # of plain decoding, over all requests
    left_out: int  # tasks, or turns of them, that the context has no room for


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `peak`: the most that the process (on a GPU: its allocator) held; None where it cannot be told."""

    target_weights: int
    draft_weights: int
    target_cache: int
    draft_cache: int
    peak: int | None
    prefix_cache: int = 0


@dataclass(frozen=True, slots=True)
class Bench:
    setting: Setting
    drafter: str
    options: BenchOptions
    counts: Counts
    arms: tuple[ArmFigures, ...]  # plain decoding first
    differences: tuple[Difference, ...]
    promised: bool  # whether equal tokens are promised for this model here
    prediction: Prediction | None
    timeline: Timeline  # (seconds, tokens so far) of one request: plain, and the best arm
    memory: Memory
    load: Load
    rouge: Rouge | None = None
    pass_rates: PassRates | None = None
    interrupted: bool = False

    @property
    def equal(self) -> bool | None:
        """Whether every run had plain decoding's tokens; None where the verifier keeps the distribution instead."""
        return not self.differences if self.options.comparable else None

    @property
    def plain(self) -> ArmFigures:
        return self.arms[0]

    @property
    def drafting(self) -> tuple[ArmFigures, ...]:
        return self.arms[1:]

    @property
    def best(self) -> ArmFigures:
        return max(self.drafting, key=lambda arm: arm.speedup.value)

    def predicted(self, arm: ArmFigures) -> float | None:
        return self.prediction.at(arm.num_draft_tokens) if self.prediction and arm.name != PLAIN else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "setting": asdict(self.setting) | {"drafter": self.drafter},
            "options": _options(self.options),
            "counts": asdict(self.counts),
            "equal": self.equal,
            "equal_promised": self.promised,
            "differences": [asdict(it) for it in self.differences],
            "interrupted": self.interrupted,
            "arms": [_arm(it, self.predicted(it)) for it in self.arms],
            "prediction": self.prediction and asdict(self.prediction),
            "rouge_2": self.rouge and asdict(self.rouge),
            "pass_at_k": self.pass_rates and asdict(self.pass_rates),
            "memory": asdict(self.memory),
            "load": self.load.as_dict(),
            "timeline": {name: list(map(list, steps)) for name, steps in self.timeline.items()},
        }


def _options(options: BenchOptions) -> dict[str, Any]:
    params = options.params
    kept = ("temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens", "ignore_eos", "verifier")
    own = {name: getattr(options, name) for name in ("policy", "rounds", "samples", "limit", "chat")}
    return own | {"lengths": list(options.lengths)} | {name: getattr(params, name) for name in kept}


def _arm(arm: ArmFigures, predicted: float | None) -> dict[str, Any]:
    """Nested figures become nested objects; a category's figures are keyed by its name."""
    return asdict(arm) | {"stats": arm.stats.as_dict(), "predicted": predicted}
