"""A tuning run from beginning to end: every drafter that could serve is scored, priced, and confirmed by generation.

Owns the order of things and their result. Knows nothing of how it is shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from foredraft import profile
from foredraft.drafters.base import Drafter
from foredraft.drafters.model import ModelDrafter
from foredraft.drafters.registry import DRAFTERS
from foredraft.drafters.self_draft import SelfDrafter
from foredraft.drafters.translated import TranslatingDrafter
from foredraft.llm import LLM
from foredraft.models.load import LoadOptions
from foredraft.tuning.acceptance import Acceptance
from foredraft.tuning.calibration import CalibrationText, Prompts, continue_prompts, pick_prompts
from foredraft.tuning.candidates import (
    SEARCHES,
    Candidates,
    Scored,
    added_memory,
    find_candidates,
    timed_turns,
)
from foredraft.tuning.carousel import measure
from foredraft.tuning.confirm import Candidate, Confirmation, confirm
from foredraft.tuning.costs import Costs, DraftCost
from foredraft.tuning.forecast import forecast
from foredraft.tuning.machine import UNWATCHED, Load, LoadMeter
from foredraft.tuning.options import TuneOptions, Watcher
from foredraft.tuning.ranking import Advice, Row, Translated
from foredraft.tuning.score import DEPTH, Scorer
from foredraft.tuning.search import optuna
from foredraft.tuning.skipping import SkipSearches
from foredraft.types import SamplingParams

COST_LAPS, COST_SECONDS = 12, 60.0


def advise(
    llm: LLM,
    options: TuneOptions | None = None,
    *,
    name: str = "",
    load: LoadOptions | None = None,
    watcher: Watcher | None = None,
) -> Advice:
    """Try every drafter that could serve this model. The LLM must be idle, and drafts as before afterwards.

    Ctrl-C (KeyboardInterrupt) during a search ends that search and keeps its trials; during the confirmation it leaves
    the rows with predictions only.

    Args:
        llm: the target, with any drafter.
        name: of the model, for the report.
        load: how draft models are loaded.

    Raises:
        ForedraftError: optuna is missing though there is something to search.
        ModelError: a draft model does not load.
        RequestError: the calibration text or the study is not usable.
    """
    return Pipeline(llm, options or TuneOptions(), name, load or LoadOptions(), watcher or Watcher()).run()


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One run of `advise`."""

    llm: LLM
    options: TuneOptions
    name: str
    load: LoadOptions
    watcher: Watcher

    def run(self) -> Advice:
        if self.options.trials and not {*SEARCHES} <= {*self.options.without}:
            optuna()  # if it is missing, say so now, not after minutes
        candidates = find_candidates(self.llm, self.options, self.load)
        prompts, text = self._texts()
        costs = self._costs(candidates, text)
        scored = self._scored(candidates.drafters, text, costs)
        searches = SkipSearches(self.llm, self.options, self.watcher, text, costs)
        if self.options.trials:
            scored += searches.run(candidates.bases)
        rows, load = self._confirmed(scored, prompts, costs)
        found = self._profile(rows, text, {name: len(trials) for name, trials in searches.trials.items()})
        counts = (len(prompts.calibration), len(prompts.held_out))
        return Advice(self.name, rows, candidates.refused, costs, searches.trials, found, self.options, counts, load)

    def _texts(self) -> tuple[Prompts, CalibrationText]:
        options = self.options
        self.watcher.stage("calibration text", 0)
        count = options.prompts
        prompts = pick_prompts(self.llm, options.calibration, 2 * count, count, seed=options.seed)
        return prompts, continue_prompts(self.llm, prompts.calibration, self._params(), seed=options.seed)

    def _params(self) -> SamplingParams:
        return SamplingParams(temperature=self.options.temperature, max_new_tokens=self.options.tokens)

    def _costs(self, candidates: Candidates, text: CalibrationText) -> Costs:
        self.watcher.stage("measuring costs", 0)
        turns = timed_turns(candidates, self.llm.model.row_invariance.max_draft_tokens)
        return measure(self.llm, text, turns, laps=COST_LAPS, max_seconds=COST_SECONDS, seed=self.options.seed)

    def _scored(self, drafters: Mapping[str, Drafter], text: CalibrationText, costs: Costs) -> list[Scored]:
        self.watcher.stage("scoring", len(drafters))
        scorer = Scorer(self.llm.model, text)
        found = []
        for name, drafter in drafters.items():
            if name in self.options.without:
                continue
            cost = costs.drafts.get(name, DraftCost(0.0, 0.0))
            found.append(Scored(name, drafter, acceptance_of(scorer, drafter), cost))
            self.watcher.tick(name)
        scorer.close()
        return found

    def _confirmed(self, scored: Sequence[Scored], prompts: Prompts, costs: Costs) -> tuple[tuple[Row, ...], Load]:
        """A row for each drafter, the best first; of a search's sets the one that did best."""
        rows = [self._row(it, costs) for it in scored]
        candidates = {
            str(i): Candidate(it.drafter, row.forecast.gamma)
            for i, (it, row) in enumerate(zip(scored, rows, strict=True))
        }
        measured, load = self._measured(candidates, prompts)
        rows = [replace(row, measured=measured.get(str(i))) for i, row in enumerate(rows)]
        best: dict[str, Row] = {}
        for row in sorted(rows, key=lambda row: -row.speedup):
            best.setdefault(row.name, row)
        return tuple(self._weighed(row) for row in best.values()), load

    def _row(self, it: Scored, costs: Costs) -> Row:
        predicted = forecast(it.acceptance, it.cost, costs.steps, self.options.tokens)
        error = costs.errors.get(SEARCHES.get(it.name, it.name), 0.0)
        memory = added_memory(it.drafter)
        row = Row(it.name, it.acceptance.alpha, costs.ratio(it.cost), predicted, memory, it.skip, cost_error=error)
        if not isinstance(it.drafter, TranslatingDrafter):
            return row
        at_best = forecast(it.acceptance, DraftCost(0.0, 0.0), costs.steps, self.options.tokens).speedup
        return replace(row, translated=Translated(it.drafter.overlap, at_best))

    def _measured(
        self, candidates: Mapping[str, Candidate], prompts: Prompts
    ) -> tuple[Mapping[str, Confirmation], Load]:
        options, meter = self.options, LoadMeter()
        self.watcher.stage("confirming", options.rounds * len(prompts.held_out))

        def tick() -> None:
            meter.sample()
            self.watcher.tick("")

        try:
            found = confirm(
                self.llm,
                candidates,
                prompts.held_out,
                self._params(),
                seed=options.seed,
                rounds=options.rounds,
                tick=tick,
            )
        except KeyboardInterrupt:
            self.watcher.tick("interrupted: predictions only")
            return {}, UNWATCHED
        return found, meter.load

    def _weighed(self, row: Row) -> Row:
        """The row with the memory of a draft built for this set alone; the search's copy holds all sub-layers."""
        kind = DRAFTERS.get(row.name)
        if row.skip is None or kind is None or kind.weight_format is None:
            return row
        return replace(row, memory=SelfDrafter(self.llm.model, row.name, kind.weight_format, row.skip).weight_bytes)

    def _profile(self, rows: Sequence[Row], text: CalibrationText, trials: Mapping[str, int]) -> profile.Profile | None:
        """The better of the searches' sets, with what it gave."""
        best = next((row for row in rows if row.skip is not None), None)
        if best is None or best.skip is None:
            return None
        figures = profile.ProfileFigures(best.alpha, best.cost_ratio, best.forecast.gamma, best.speedup)
        source = str(self.options.calibration.name) if self.options.calibration else "the model's own output"
        found = profile.HowFound(
            "TPE and local steps on teacher-forced acceptance",
            trials[best.name],
            self.options.seed,
            f"{len(text.samples)} prompts from {source}, {text.params.max_new_tokens} tokens each",
        )
        return profile.profile_for(self.llm.model, best.skip, {best.name: figures}, found)


def acceptance_of(scorer: Scorer, drafter: Drafter) -> Acceptance:
    if isinstance(drafter, SelfDrafter):
        return scorer.score(drafter.model)
    if isinstance(drafter, TranslatingDrafter):
        return scorer.score_drafter(drafter, DEPTH)
    if isinstance(drafter, ModelDrafter):
        return scorer.score_model(drafter.model)
    return scorer.score_drafter(drafter)
