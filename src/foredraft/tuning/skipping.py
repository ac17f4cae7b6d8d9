"""The searches for sub-layers to leave out, on one model and one text: trials, and the best of them scored again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from foredraft import profile
from foredraft.drafters.self_draft import SelfDrafter
from foredraft.llm import LLM
from foredraft.models.base import CausalModel, SkipSet
from foredraft.tuning.calibration import CalibrationText
from foredraft.tuning.candidates import SEARCHES, Scored
from foredraft.tuning.costs import Costs, DraftCost
from foredraft.tuning.forecast import MAX_GAMMA, forecast
from foredraft.tuning.options import TuneOptions, Watcher
from foredraft.tuning.score import DEPTH, Scorer
from foredraft.tuning.search import Evaluation, Limits, Search, Study, Trial

FINALISTS = 4  # sets of a search that are scored again, exactly and on more text
EXACT_SECONDS = 60.0  # at most, for that


def draft_cost(costs: Costs, weights: str, base: CausalModel, skip: SkipSet) -> DraftCost:
    """What a draft without these sub-layers costs, by the fit."""
    layers = base.num_layers
    return costs.sublayers[weights].draft(layers - len(skip.attention), layers - len(skip.mlp))


@dataclass(slots=True)
class SkipSearches:
    """One search after another; a later one starts from the best sets of those before."""

    llm: LLM
    options: TuneOptions
    watcher: Watcher
    text: CalibrationText
    costs: Costs
    trials: dict[str, list[Trial]] = field(default_factory=dict)

    def run(self, bases: dict[str, CausalModel]) -> list[Scored]:
        """The best sets of every search, scored on all of the text."""
        found: list[Scored] = []
        for i, (name, base) in enumerate(bases.items()):
            share = 1.0 if len(bases) == 1 else 0.6 if i == 0 else 0.4 / (len(bases) - 1)
            found += self._searched(name, base, share * self.options.max_seconds)
        return found

    def _searched(self, name: str, base: CausalModel, seconds: float) -> list[Scored]:
        study, costs = self._study(name), self.costs
        if "costs" in study.notes:  # of the run that began the study: its trials are comparable with those to come
            costs = Costs.from_dict(study.notes["costs"])
        study.note("costs", costs.as_dict())
        scorer = Scorer(self.llm.model, self.text.every(2))
        self._search(name, base, study, scorer, costs, seconds)
        scorer.close()
        self.trials[name] = list(study.trials.values())
        return self._finalists(name, base, study.ranked()[:FINALISTS], costs)

    def _study(self, name: str) -> Study:
        temperature = self.options.temperature
        about = f"{profile.model_hash(self.llm.model)} on text {self.text.fingerprint} at temperature {temperature}"
        return Study(self.llm.model.num_layers, name, self.options.study, about)

    def _search(self, name: str, base: CausalModel, study: Study, scorer: Scorer, costs: Costs, seconds: float) -> None:
        options = self.options

        def objective(skip: SkipSet) -> Evaluation:
            acceptance = scorer.score(base.variant(skip=skip))
            cost = draft_cost(costs, SEARCHES[name], base, skip)
            return Evaluation(acceptance.alpha, forecast(acceptance, cost, costs.steps, options.tokens))

        def observer(trial: Trial, best: Trial) -> None:
            self.watcher.tick(f"best {best.speedup:.3f}, skipping {len(best.skip)} of {2 * base.num_layers}")

        limits = Limits(options.trials, seconds, options.seed)
        earlier = [it for other in self.trials.values() for it in sorted(other, key=lambda it: -it.speedup)[:20]]
        self.watcher.stage(f"searching {name}", options.trials)
        Search(study, objective, limits, [it.skip for it in earlier], observer).run()

    def _finalists(self, name: str, base: CausalModel, trials: Sequence[Trial], costs: Costs) -> list[Scored]:
        self.watcher.stage(f"finalists of {name}", len(trials))
        scorer = Scorer(self.llm.model, self.text)
        found = []
        for trial in trials:
            model = base.variant(skip=trial.skip)
            began = perf_counter()
            acceptance = scorer.score(model)
            if (perf_counter() - began) * DEPTH * FINALISTS < EXACT_SECONDS:
                acceptance = scorer.score(model, depth=min(MAX_GAMMA, trial.gamma + 2), exact=True)
            cost = draft_cost(costs, SEARCHES[name], base, trial.skip)
            drafter = SelfDrafter(base, name, None, trial.skip)
            found.append(Scored(name, drafter, acceptance, cost, trial.skip))
            self.watcher.tick("")
        scorer.close()
        found.sort(key=lambda it: -forecast(it.acceptance, it.cost, costs.steps, self.options.tokens).speedup)
        return found[: self.options.confirmed]
