"""An audit from beginning to end: references, drafters, controls, and where something failed its smallest case."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from foredraft import profile
from foredraft.audit import casefile, distribution
from foredraft.audit.asks import BLOCK, OWN, Ask, asks, derived, is_far
from foredraft.audit.controls import CONTROLS, Control
from foredraft.audit.distribution import Path, Tree, make_tree
from foredraft.audit.exact import Compared, Difference, Reference, compare, compare_run, grid, reference
from foredraft.audit.options import AuditOptions
from foredraft.audit.play import Subject
from foredraft.audit.result import Audit, Checked, Failure, Planted
from foredraft.audit.shrink import replay, smallest
from foredraft.audit.subjects import Audited, fingerprint
from foredraft.diagnosis.setting import setting
from foredraft.llm import LLM
from foredraft.tuning.options import Watcher

CONTROL_BATCH, CONTROL_LENGTH = 3, BLOCK - 1
CONTROL_REQUESTS = 2  # of each setting
TRIED = 3  # differences, until one repeats


def audit(
    llm: LLM,
    audited: Sequence[Audited],
    options: AuditOptions | None = None,
    *,
    name: str = "",
    left_out: Mapping[str, str] | None = None,
    watcher: Watcher | None = None,
) -> Audit:
    """Compare, test and plant. The LLM must be idle, and drafts as before afterwards.

    Ctrl-C (KeyboardInterrupt) keeps what was found; what is incomplete cannot pass.

    Args:
        audited: the drafters, as `subjects.find` makes them.
        name, left_out: for the report: the target's name, and the drafters that cannot draft for it.
    """
    run = Run(llm, options or AuditOptions(), watcher or Watcher(), tests=len(audited))
    try:
        run.prepare()
        for it in audited:
            run.check(it)
        run.plant()
        complete = True
    except KeyboardInterrupt:
        complete = False
    return Audit(
        setting(llm, name),
        profile.model_hash(llm.model),
        run.options,
        llm.model.row_invariance.exact,
        tuple(run.checked),
        left_out or {},
        tuple(run.controls),
        run.failure,
        complete,
    )


@dataclass(slots=True)
class Run:
    """What there is so far."""

    llm: LLM
    options: AuditOptions
    watcher: Watcher
    asks: list[Ask] = field(default_factory=list)
    truth: Reference = field(default_factory=dict)
    prompts: list[Path] = field(default_factory=list)
    trees: list[Tree] = field(default_factory=list)  # of the first prompts, as far as they were needed
    repeating: list[Tree] = field(default_factory=list)
    checked: list[Checked] = field(default_factory=list)
    controls: list[Planted] = field(default_factory=list)
    failure: Failure | None = None
    tests: int = 1  # of distributions, of sound drafters

    def prepare(self) -> None:
        """Plain decoding of every request."""
        self.watcher.stage("plain decoding", 0)
        whole = asks(self.llm, self.options)
        self.truth = reference(self.llm, whole)
        more = derived(self.llm, whole, {seed: outcome.tokens for seed, outcome in self.truth.items()})
        self.truth |= reference(self.llm, more)
        self.asks = more + whole
        self.prompts = sorted({ask.prompt for ask in whole}, key=len)[: distribution.TREES]  # every draw reads one

    @property
    def threshold(self) -> float:
        """Of one test, so that all of them together raise a false alarm as seldom as promised (Bonferroni)."""
        return self.options.alarm / max(1, self.tests)

    def check(self, it: Audited) -> None:
        most = self.llm.model.row_invariance.max_draft_tokens
        self.watcher.stage(it.name, len(grid(self.options, most)) + 1)
        subject, found, tested = Subject(it.drafter), Compared(), None
        try:
            found = compare(self.llm, subject, self.asks, self.truth, self.options, self.watcher.tick)
            policy = "fixed" if not hasattr(it.drafter, "drafters") else None
            drawing = Subject(it.drafter, policy)
            seed = self.options.seed
            tree = distribution.telling_tree(self.llm, drawing, seed, self._trees(), self._repeating())
            tested = self._test(drawing, tree)
            self.watcher.tick("distribution")
        finally:
            complete = tested is not None
            digest = fingerprint(self.llm, it.drafter)
            self.checked.append(Checked(it.name, it.flag, digest, found, tested, complete))
        if found.differences and self.failure is None:
            self.watcher.stage(f"{it.name}: looking for the smallest case", 0)
            self.failure = self._failure(it, subject, found.differences)

    def _failure(self, it: Audited, subject: Subject, found: Sequence[Difference]) -> Failure:
        """The smallest case, once it has failed again as it will be printed; else the first one that was found."""
        best = next(filter(None, (smallest(self.llm, subject, one) for one in found[:TRIED])), None)
        if best is None:
            return Failure(it.name, it.flag, found[0], repeats=False)
        own = next((ask.params.processors for ask in best.case.asks if ask.setting.startswith(OWN)), ())
        printed = casefile.loads(casefile.dumps(best.case), own)
        again = replay(self.llm, subject, printed)
        return Failure(it.name, it.flag, again or best, repeats=again is not None)

    def _test(self, subject: Subject, tree: Tree) -> distribution.Tested:
        return distribution.test(self.llm, subject, tree, self.options, self.threshold)

    def _trees(self) -> Iterator[Tree]:
        """Each is made once, if at all."""
        for i, prompt in enumerate(self.prompts):
            if i == len(self.trees):
                self.trees.append(make_tree(self.llm, prompt))
            yield self.trees[i]

    def _repeating(self) -> Iterator[Tree]:
        """Of prompts that repeat themselves."""
        for i, tree in zip(range(2), self._trees(), strict=False):
            if i == len(self.repeating):
                self.repeating.append(distribution.repeating(self.llm, tree))
            yield self.repeating[i]

    def plant(self) -> None:
        self.watcher.stage("controls", len(CONTROLS))
        for control in CONTROLS:
            self.controls.append(self._planted(control))
            self.watcher.tick(control.name)

    def _planted(self, control: Control) -> Planted:
        missing = self._missing(control)
        if missing:
            return Planted(control.name, control.kind, None, missing)
        if control.kind == "exact":
            return self._planted_exactly(control)
        tree = next(self._trees())
        found = self._test(control.drawing_subject(tree, self.llm.model.vocab_size), tree)
        return Planted(control.name, control.kind, not found.passed, found.error or f"p = {found.p_value:.1e}")

    def _missing(self, control: Control) -> str:
        """Why this bug cannot show here; empty where it can."""
        if control.needs == "grammar" and not any(ask.params.structured for ask in self.asks):
            return "no grammar can be had for this model here"
        if control.needs == "tokenizer" and self.llm._tokenizer is None:
            return "there is no tokenizer, and so no text"
        return "" if not control.far or any(map(is_far, self.asks)) else "the context has no room for a long prompt"

    def _crowd(self, control: Control) -> list[Ask]:
        """A few requests of every setting: a bug may show in one of them only. Long prompts only where it has to."""
        found: dict[str, list[Ask]] = {}
        for ask in self.asks:
            if not is_far(ask):
                found.setdefault(ask.setting, []).append(ask)
        if control.far:
            return [*filter(is_far, self.asks), *(own[0] for own in found.values())]
        return [ask for own in found.values() for ask in own[:CONTROL_REQUESTS]]

    def _planted_exactly(self, control: Control) -> Planted:
        found = Compared()
        subject = control.exact_subject(self.truth, self.llm.model.vocab_size)
        crowd = [replace(ask, num_draft_tokens=CONTROL_LENGTH) for ask in self._crowd(control)]
        compare_run(self.llm, subject, crowd, CONTROL_BATCH, self.truth, found)
        differing = len(found.differences)
        kinds = ", ".join(sorted({difference.what for difference in found.differences}))
        by = f"{differing} of {found.requests} requests ({kinds})" if differing else "nothing differed"
        return Planted(control.name, control.kind, differing > 0, by)
