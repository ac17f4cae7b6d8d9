"""Which drafter serves a model best: every one that could is scored, priced, and confirmed by generation.

Owns the order of things and their result, the advice. Knows nothing of how it is shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

from foredraft import profile
from foredraft.drafters import DraftContext, make_drafter
from foredraft.drafters.base import Drafter
from foredraft.drafters.model import ModelDrafter
from foredraft.drafters.self_draft import SelfDrafter
from foredraft.errors import ModelError
from foredraft.llm import LLM
from foredraft.models.base import CausalModel, SkipSet
from foredraft.models.load import LoadOptions
from foredraft.tuning.acceptance import Acceptance
from foredraft.tuning.advice import Advice, Row, TuneOptions, Watcher
from foredraft.tuning.calibration import Calibration, Prompts, continue_prompts, pick_prompts
from foredraft.tuning.confirm import Candidate, Measured, confirm
from foredraft.tuning.costs import Arm, Costs, DraftCost, Repeat, measure
from foredraft.tuning.forecast import MAX_GAMMA, Forecast, forecast
from foredraft.tuning.score import DEPTH, Scorer
from foredraft.tuning.search import Evaluation, Limits, Search, Study, Trial, optuna
from foredraft.types import SamplingParams

OWN, INT4 = "own", "int4"  # weights that a search for sub-layers can run on
SEARCHES = {"skip": OWN, "int4+skip": INT4}
GAMMAS = (2, 6)  # draft lengths that are timed
MORE_GAMMAS = (1, 4, 10, MAX_GAMMA)  # of wider passes, on a drafter that costs nothing
FINALISTS = 4  # sets of a search that are scored again, exactly and on more text
EXACT_SECONDS = 60.0  # at most, for that
COST_LAPS, COST_SECONDS = 12, 60.0


@dataclass(frozen=True, slots=True)
class Scored:
    name: str
    drafter: Drafter
    acceptance: Acceptance
    cost: DraftCost
    skip: SkipSet | None = None


def advise(
    llm: LLM,
    options: TuneOptions | None = None,
    *,
    name: str = "",
    load: LoadOptions | None = None,
    watcher: Watcher | None = None,
) -> Advice:
    """Try every drafter that could serve this model. The LLM must be idle, and is its old self afterwards.

    Ctrl-C (KeyboardInterrupt) in the search ends it with what it has found, in the confirmation leaves rows unmeasured.

    Args:
        llm: the target, with any drafter.
        name: of the model, for the report.
        load: how draft models are loaded.

    Raises:
        ForedraftError: optuna is missing though there is something to search.
        ModelError: a draft model does not load.
        RequestError: the calibration text or the study is not usable.
    """
    return Advisor(llm, options or TuneOptions(), name, load or LoadOptions(), watcher or Watcher()).run()


@dataclass(slots=True)
class Advisor:
    """One run of `advise`."""

    llm: LLM
    options: TuneOptions
    name: str
    load: LoadOptions
    watcher: Watcher
    refused: dict[str, str] = field(default_factory=dict)
    trials: dict[str, list[Trial]] = field(default_factory=dict)

    def run(self) -> Advice:
        if self.options.trials and not {*SEARCHES} <= {*self.options.without}:
            optuna()  # say at once that it is missing
        options = self.options
        drafters = self._drafters()
        prompts, calibration = self._texts()
        costs = self._costs(drafters, calibration)
        scored = self._scored(drafters, calibration, costs)
        for name, weights in SEARCHES.items():
            base = self._base(weights, drafters)
            if base is not None and options.trials and name not in {*options.without, *self.refused}:
                scored += self._searched(name, base, calibration, costs)
        rows = self._confirmed(scored, prompts, costs)
        counts = (len(prompts.calibration), len(prompts.held_out))
        found = self._profile(rows, calibration)
        return Advice(self.name, rows, self.refused, costs, self.trials, found, options, counts)

    def _drafters(self) -> dict[str, Drafter]:
        """Those that need no search, and what a search runs on; what a model refuses is noted."""
        wanted = [name for name in ("ngram", "int4", "int8") if name not in self.options.without]
        if "int4+skip" not in self.options.without and INT4 not in wanted:
            wanted.append(INT4)
        context = DraftContext(self.llm.model, self.llm._tokenizer, self.load)
        found: dict[str, Drafter] = {}
        for name in wanted:
            try:
                found[name] = make_drafter(name, context)
            except ModelError as error:
                self.refused[name] = str(error)
        found.update({draft: make_drafter(draft, context) for draft in self.options.drafts})
        try:
            self.llm.model.variant(skip=SkipSet((), (self.llm.model.num_layers - 1,)))
        except ModelError as error:
            self.refused.update(dict.fromkeys(SEARCHES, str(error)))
        return found

    def _texts(self) -> tuple[Prompts, Calibration]:
        options = self.options
        self.watcher.stage("calibration text", 0)
        params = SamplingParams(temperature=options.temperature, max_new_tokens=options.tokens)
        count = options.prompts
        prompts = pick_prompts(self.llm, options.calibration, 2 * count, count, seed=options.seed)
        return prompts, continue_prompts(self.llm, prompts.calibration, params, seed=options.seed)

    def _costs(self, drafters: Mapping[str, Drafter], calibration: Calibration) -> Costs:
        self.watcher.stage("measuring costs", 0)
        most = self.llm.model.row_invariance.max_draft_tokens
        arms = [Arm(name, drafter, min(gamma, most)) for name, drafter in drafters.items() for gamma in GAMMAS]
        arms += [Arm("repeat", Repeat(), min(gamma, most)) for gamma in MORE_GAMMAS]
        for weights in {SEARCHES[name] for name in SEARCHES if name not in self.refused}:
            base = self._base(weights, drafters)
            arms += [] if base is None else self._family(weights, base)
        return measure(self.llm, calibration, arms, laps=COST_LAPS, max_seconds=COST_SECONDS, seed=self.options.seed)

    def _family(self, weights: str, base: CausalModel) -> list[Arm]:
        """Drafts with different shares of the sub-layers, to fit a sub-layer's price to."""
        layers = base.num_layers
        every, odd, most = range(layers), range(1, layers, 2), [i for i in range(layers) if i % 4]
        sets = [SkipSet((), ()), SkipSet(tuple(odd), ()), SkipSet((), tuple(odd)), SkipSet(tuple(most), tuple(most))]
        drafters = [(skip, SelfDrafter(base, weights, None, skip)) for skip in sets if len(skip) < 2 * len(every)]
        return [
            Arm(f"{weights} {i}", drafter, gamma, weights, layers - len(skip.attention), layers - len(skip.mlp))
            for i, (skip, drafter) in enumerate(drafters)
            for gamma in GAMMAS
        ]

    def _base(self, weights: str, drafters: Mapping[str, Drafter]) -> CausalModel | None:
        if weights == OWN:
            return self.llm.model
        found = drafters.get(weights)
        return found.model if isinstance(found, SelfDrafter) else None

    def _scored(self, drafters: Mapping[str, Drafter], calibration: Calibration, costs: Costs) -> list[Scored]:
        self.watcher.stage("scoring", len(drafters))
        scorer = Scorer(self.llm.model, calibration)
        found = []
        for name, drafter in drafters.items():
            if name in self.options.without:
                continue
            if isinstance(drafter, SelfDrafter):
                acceptance = scorer.score(drafter.model)
            elif isinstance(drafter, ModelDrafter):
                acceptance = scorer.score_model(drafter.model)
            else:
                acceptance = scorer.score_drafter(drafter)
            found.append(Scored(name, drafter, acceptance, costs.drafts.get(name, DraftCost(0.0, 0.0))))
            self.watcher.tick(name)
        scorer.close()
        return found

    def _searched(self, name: str, base: CausalModel, calibration: Calibration, costs: Costs) -> list[Scored]:
        """The best sets of a search, scored once more on all of the text."""
        study = self._study(name, calibration, costs)
        if "costs" in study.notes:  # of the run that began the study: its trials are comparable with those to come
            costs = Costs.from_dict(study.notes["costs"])
        study.note("costs", costs.as_dict())
        scorer = Scorer(self.llm.model, calibration.every(2))
        self._search(name, base, study, scorer, costs)
        scorer.close()
        self.trials[name] = list(study.trials.values())
        return self._finalists(name, base, study.ranked()[:FINALISTS], calibration, costs)

    def _study(self, name: str, calibration: Calibration, costs: Costs) -> Study:
        temperature = self.options.temperature
        about = f"{profile.model_hash(self.llm.model)} on text {calibration.fingerprint} at temperature {temperature}"
        return Study(self.llm.model.num_layers, name, self.options.study, about)

    def _search(self, name: str, base: CausalModel, study: Study, scorer: Scorer, costs: Costs) -> None:
        weights, options = SEARCHES[name], self.options

        def objective(skip: SkipSet) -> Evaluation:
            acceptance = scorer.score(base.variant(skip=skip))
            return Evaluation(acceptance.alpha, self._forecast(acceptance, _cost(costs, weights, base, skip), costs))

        def observer(trial: Trial, best: Trial) -> None:
            self.watcher.tick(f"best {best.speedup:.3f}, skipping {len(best.skip)} of {2 * base.num_layers}")

        searches = [other for other in SEARCHES if other not in {*options.without, *self.refused}]
        share = 0.6 if name == searches[0] and len(searches) > 1 else 1.0 if len(searches) == 1 else 0.4
        limits = Limits(options.trials, options.max_seconds * share, options.seed)
        earlier = [it for other in self.trials.values() for it in sorted(other, key=lambda it: -it.speedup)[:20]]
        self.watcher.stage(f"searching {name}", options.trials)
        Search(study, objective, limits, [it.skip for it in earlier], observer).run()

    def _finalists(
        self, name: str, base: CausalModel, trials: Sequence[Trial], calibration: Calibration, costs: Costs
    ) -> list[Scored]:
        self.watcher.stage(f"finalists of {name}", len(trials))
        scorer = Scorer(self.llm.model, calibration)
        found = []
        for trial in trials:
            model = base.variant(skip=trial.skip)
            began = perf_counter()
            acceptance = scorer.score(model)
            if (perf_counter() - began) * DEPTH * FINALISTS < EXACT_SECONDS:
                acceptance = scorer.score(model, depth=min(MAX_GAMMA, trial.gamma + 2), exact=True)
            drafter = SelfDrafter(base, name, None, trial.skip)
            cost = _cost(costs, SEARCHES[name], base, trial.skip)
            found.append(Scored(name, drafter, acceptance, cost, trial.skip))
            self.watcher.tick("")
        scorer.close()
        found.sort(key=lambda it: -self._forecast(it.acceptance, it.cost, costs).speedup)
        return found[: self.options.confirmed]

    def _forecast(self, acceptance: Acceptance, cost: DraftCost, costs: Costs) -> Forecast:
        return forecast(acceptance, cost, costs.steps, self.options.tokens)

    def _confirmed(self, scored: Sequence[Scored], prompts: Prompts, costs: Costs) -> tuple[Row, ...]:
        """A row for each drafter, the best first; of a search's sets the one that did best."""
        rows = [
            Row(
                it.name,
                it.acceptance.alpha,
                costs.ratio(it.cost),
                self._forecast(it.acceptance, it.cost, costs),
                _memory(it.drafter),
                it.skip,
            )
            for it in scored
        ]
        candidates = {
            str(i): Candidate(it.drafter, row.forecast.gamma)
            for i, (it, row) in enumerate(zip(scored, rows, strict=True))
        }
        options = self.options
        self.watcher.stage("confirming", options.rounds * len(prompts.held_out))
        params = SamplingParams(temperature=options.temperature, max_new_tokens=options.tokens)
        measured: dict[str, Measured] = {}
        try:
            measured = confirm(
                self.llm,
                candidates,
                prompts.held_out,
                params,
                seed=options.seed,
                rounds=options.rounds,
                tick=lambda: self.watcher.tick(""),
            )
        except KeyboardInterrupt:
            self.watcher.tick("interrupted: predictions only")
        rows = [replace(row, measured=measured.get(str(i))) for i, row in enumerate(rows)]
        best: dict[str, Row] = {}
        for row in sorted(rows, key=lambda row: -row.speedup):
            best.setdefault(row.name, row)
        return tuple(self._weighed(row) for row in best.values())

    def _weighed(self, row: Row) -> Row:
        """With the memory of a draft that is built for its set alone, not for the search."""
        if row.skip is None or SEARCHES[row.name] == OWN:
            return row
        return replace(row, memory=SelfDrafter(self.llm.model, row.name, "int4", row.skip).weight_bytes)

    def _profile(self, rows: Sequence[Row], calibration: Calibration) -> profile.Profile | None:
        """The better of the searches' sets, with what it gave."""
        best = next((row for row in rows if row.skip is not None), None)
        if best is None or best.skip is None:
            return None
        figures = profile.Measured(best.alpha, best.cost_ratio, best.forecast.gamma, best.speedup)
        source = str(self.options.calibration.name) if self.options.calibration else "the model's own output"
        found = profile.HowFound(
            "TPE and local steps on teacher-forced acceptance",
            len(self.trials[best.name]),
            self.options.seed,
            f"{len(calibration.samples)} prompts from {source}, {calibration.params.max_new_tokens} tokens each",
        )
        return profile.profile_for(self.llm.model, best.skip, {best.name: figures}, found)


def _cost(costs: Costs, weights: str, base: CausalModel, skip: SkipSet) -> DraftCost:
    layers = base.num_layers
    return costs.sublayers[weights].draft(layers - len(skip.attention), layers - len(skip.mlp))


def _memory(drafter: Drafter) -> int:
    """Bytes beside the target's own."""
    if isinstance(drafter, SelfDrafter):
        return drafter.weight_bytes
    if isinstance(drafter, ModelDrafter):
        return drafter.model.weight_bytes + drafter.model.cache.nbytes
    return 0
