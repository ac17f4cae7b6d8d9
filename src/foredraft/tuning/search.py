"""Which sub-layers a draft can leave out: Bayesian search with one binary variable for each, and local steps.

First each sub-layer is left out alone, then more and more of those that are missed least. After that a tree-structured
Parzen estimator over all variables (optuna, extra `tune`) takes turns with small changes to the best sets. Every trial
is stored as soon as it ends, so an interrupted search loses nothing, and a study on disk can be continued. Knows
nothing of models: it calls an objective.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from foredraft.errors import ForedraftError, RequestError, missing_extra
from foredraft.models.base import SkipSet
from foredraft.tuning.forecast import Forecast

Bits = tuple[bool, ...]  # of the attentions, then of the MLPs: skipped?


@dataclass(frozen=True, slots=True)
class Trial:
    """A set that was tried, and the speed-up that it should give."""

    skip: SkipSet
    speedup: float
    alpha: float
    gamma: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    alpha: float
    forecast: Forecast


Objective = Callable[[SkipSet], Evaluation]
Observer = Callable[[Trial, Trial], None]
"""Called after each trial with it and the best so far."""


@dataclass(frozen=True, slots=True)
class Limits:
    trials: int = 400
    max_seconds: float = 240.0
    seed: int = 0


def optuna() -> Any:
    """The library, quiet. Raises ForedraftError where the extra is not installed."""
    try:
        import optuna as library
    except ImportError as error:
        raise ForedraftError(missing_extra("the search needs", "optuna", "tune")) from error
    library.logging.set_verbosity(library.logging.ERROR)
    return library


class Study:
    """The trials of one search, in memory, and on disk where a path is given.

    Raises:
        ForedraftError: optuna is not installed.
        RequestError: the file is no study, or the study of something else.
    """

    def __init__(self, num_layers: int, name: str = "skip", path: Path | None = None, about: str = "") -> None:
        self.num_layers = num_layers
        self.library = optuna()
        self.distributions = {n: self.library.distributions.CategoricalDistribution((False, True)) for n in self.names}
        self.trials: dict[Bits, Trial] = {}
        self.stored = self._open(path, name, about) if path else None
        self.memory: Any = None

    @property
    def names(self) -> list[str]:
        return [f"{kind}_{i}" for kind in ("attention", "mlp") for i in range(self.num_layers)]

    @property
    def best(self) -> Trial | None:
        return max(self.trials.values(), key=lambda it: it.speedup, default=None)

    def ranked(self) -> list[Trial]:
        return sorted(self.trials.values(), key=lambda it: -it.speedup)

    @property
    def notes(self) -> Mapping[str, Any]:
        """What is kept beside the trials."""
        return self.stored.user_attrs if self.stored is not None else {}

    def note(self, key: str, value: Any) -> None:
        if self.stored is not None:
            self.stored.set_user_attr(key, value)

    def _open(self, path: Path, name: str, about: str) -> Any:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            study = self.library.create_study(
                storage=f"sqlite:///{path}", study_name=name, load_if_exists=True, direction="maximize"
            )
            known = study.user_attrs.setdefault("about", about)
        except Exception as error:  # of sqlite, of its driver, or of optuna: the file is not one of ours
            raise RequestError(f"{path} is no study that can be read ({error}); give another path") from error
        if known != about:
            raise RequestError(f"{path} is the study of {known}, not of {about}; give another path")
        study.set_user_attr("about", about)
        for trial in study.get_trials(deepcopy=False):
            if trial.value is not None:
                self._remember(tuple(bool(trial.params[n]) for n in self.names), trial.value, trial.user_attrs)
        return study

    def _remember(self, bits: Bits, speedup: float, attrs: Mapping[str, Any]) -> Trial:
        trial = Trial(skip_set(bits), speedup, attrs["alpha"], attrs["gamma"])
        self.trials[bits] = trial
        return trial

    def begin(self, seed: int) -> None:
        """Make a sampler that knows every trial so far."""
        sampler = self.library.samplers.TPESampler(
            seed=seed + len(self.trials), multivariate=True, n_startup_trials=0, constant_liar=False
        )
        self.memory = self.library.create_study(direction="maximize", sampler=sampler)
        for bits, trial in self.trials.items():
            self.memory.add_trial(self._frozen(bits, trial))

    def suggest(self) -> tuple[Bits, Any]:
        """A set that the sampler proposes, and its optuna trial, which must be told a result or dropped."""
        trial = self.memory.ask(self.distributions)
        return tuple(trial.params[n] for n in self.names), trial

    def drop(self, trial: Any) -> None:
        self.memory.tell(trial, state=self.library.trial.TrialState.FAIL)

    def add(self, bits: Bits, found: Evaluation) -> Trial:
        attrs = {"alpha": found.alpha, "gamma": found.forecast.gamma}
        trial = self._remember(bits, found.forecast.speedup, attrs)
        for study in (self.memory, self.stored):
            if study is not None:
                study.add_trial(self._frozen(bits, trial))
        return trial

    def _frozen(self, bits: Bits, trial: Trial) -> Any:
        return self.library.trial.create_trial(
            params=dict(zip(self.names, bits, strict=True)),
            distributions=self.distributions,
            value=trial.speedup,
            user_attrs={"alpha": trial.alpha, "gamma": trial.gamma},
        )


def skip_set(bits: Bits) -> SkipSet:
    layers = len(bits) // 2
    chosen = [i for i, bit in enumerate(bits) if bit]
    return SkipSet(tuple(i for i in chosen if i < layers), tuple(i - layers for i in chosen if i >= layers))


def as_bits(skip: SkipSet, layers: int) -> Bits:
    return tuple(i in skip.attention for i in range(layers)) + tuple(i in skip.mlp for i in range(layers))


@dataclass(slots=True)
class Search:
    """A search that Ctrl-C (KeyboardInterrupt) ends and a later run continues."""

    study: Study
    objective: Objective
    limits: Limits = field(default_factory=Limits)
    starts: Sequence[SkipSet] = ()  # tried first, e.g. the best of a related search
    observer: Observer | None = None
    interrupted: bool = False

    def run(self) -> list[Trial]:
        """Search, and return all trials, the best first; those of earlier runs count towards the limit."""
        source = random.Random(self.limits.seed * 1_000_003 + len(self.study.trials))
        self.study.begin(self.limits.seed)
        ends = perf_counter() + self.limits.max_seconds
        try:
            for bits in self._candidates(source):
                if len(self.study.trials) >= self.limits.trials or perf_counter() >= ends:
                    break
                self._try(bits)
        except KeyboardInterrupt:
            self.interrupted = True
        return self.study.ranked()

    def _try(self, bits: Bits) -> None:
        trial = self.study.add(bits, self.objective(skip_set(bits)))
        if self.observer is not None:
            assert self.study.best is not None
            self.observer(trial, self.study.best)

    def _candidates(self, source: random.Random) -> Iterator[Bits]:
        """Sets that were not tried before, until all possible ones have been."""
        size = 2 * self.study.num_layers
        yield from self._fresh(as_bits(skip, self.study.num_layers) for skip in self.starts)
        yield from self._fresh(tuple(i == j for j in range(size)) for i in self._singles(size))
        yield from self._fresh(self._path(size))
        while len(self.study.trials) < 2**size - 2:  # neither the empty set nor the full one is a draft
            bits, trial = self.study.suggest()
            self.study.drop(trial)  # it comes back as a trial of its own when it has been tried
            yield bits if self._is_new(bits) else self._mutated(source)
            if self._is_new(near := self._mutated(source)):
                yield near

    def _is_new(self, bits: Bits) -> bool:
        return bits not in self.study.trials and any(bits) and not all(bits)

    def _fresh(self, sets: Iterator[Bits]) -> Iterator[Bits]:
        return (bits for bits in sets if self._is_new(bits))

    def _singles(self, size: int) -> Sequence[int]:
        """Which sub-layers are tried alone: all of them, or as many as fit half of the trials."""
        return range(0, size, -(-2 * size // max(1, self.limits.trials)))

    def _path(self, size: int) -> Iterator[Bits]:
        """Larger and larger sets of the sub-layers that are missed least."""
        alone = {bits.index(True): trial.alpha for bits, trial in self.study.trials.items() if sum(bits) == 1}
        order = sorted(alone, key=lambda i: -alone[i])
        for count in range(2, len(order)):
            yield tuple(i in order[:count] for i in range(size))

    def _mutated(self, source: random.Random) -> Bits:
        """One of the best sets with one or two small changes, or with more if all such sets have been tried."""
        best = [as_bits(trial.skip, self.study.num_layers) for trial in self.study.ranked()[:4]]
        for attempt in range(400):
            bits = list(best[min(int(source.expovariate(1.0)), len(best) - 1)])
            for _ in range(1 + source.randrange(2) + attempt // 40):
                self._change(bits, source)
            if self._is_new(tuple(bits)):
                break
        return tuple(bits)

    @staticmethod
    def _change(bits: list[bool], source: random.Random) -> None:
        inside, outside = ([i for i, bit in enumerate(bits) if bit is value] for value in (True, False))
        if inside and outside and source.random() < 0.4:
            bits[source.choice(inside)], bits[source.choice(outside)] = False, True
        else:
            i = source.randrange(len(bits))
            bits[i] = not bits[i]
