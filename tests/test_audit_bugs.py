"""Bugs planted by hand in the installed package, as somebody may have them: the audit of a sound drafter finds each."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import foredraft.engine
from foredraft import LLM
from foredraft.audit import AuditOptions
from foredraft.audit.exact import Compared, compare
from foredraft.audit.pipeline import Run
from foredraft.audit.play import Subject
from foredraft.audit.subjects import find
from foredraft.engine import Engine
from foredraft.models.load import LoadOptions
from foredraft.steering import Steering
from foredraft.structured.mask import only
from foredraft.tuning.options import Watcher
from foredraft.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")
BRIEF = AuditOptions((3, None), (4,), ("leaving",), 3, 18, 500)


@pytest.fixture(scope="module")
def prepared() -> Run:
    run = Run(LLM(draft="none"), BRIEF, Watcher())
    run.prepare()
    return run


def compared(run: Run) -> Compared:
    (audited,), _ = find(run.llm, ["model"], LoadOptions(), bundled=True)
    return compare(run.llm, Subject(audited.drafter), run.asks, run.truth, BRIEF, lambda text: None)


def masks_a_row_late(patch: pytest.MonkeyPatch) -> None:
    apply = Steering.apply

    def late(self: Steering, scores: Any, prefix: Any, paths: Any) -> Any:
        if self.constraint is None:
            return apply(self, scores, prefix, paths)
        constraint, self.constraint = self.constraint, None
        scores, self.constraint = apply(self, scores, prefix, paths), constraint
        return only(scores, constraint.allowed_after([paths[0], *paths[:-1]]))

    patch.setattr(Steering, "apply", late)


def writes_into_the_logits(patch: pytest.MonkeyPatch) -> None:
    def written(draft: Any, logits: Any, request: Any) -> Any:
        verdict = verify(draft, logits, request)
        if draft.tokens and request.params.temperature > 0:
            logits.div_(request.params.temperature)
        return verdict

    patch.setattr(foredraft.engine, "verify", written)


def shows_refused_text(patch: pytest.MonkeyPatch) -> None:
    commit = Engine._commit

    def told(self: Engine, request: Any, draft: Any, logits: Any) -> Any:
        output = commit(self, request, draft, logits)
        kept = sum(output.from_draft)
        if kept < len(draft) and not request.params.stop and output.finish_reason is None:
            request.stop_rule(draft.tokens[kept])
        return output

    patch.setattr(Engine, "_commit", told)


def hands_over_one_too_few(patch: pytest.MonkeyPatch) -> None:
    commit = Engine._commit

    def short(self: Engine, request: Any, draft: Any, logits: Any) -> Any:
        output = commit(self, request, draft, logits)
        return replace(output, token_ids=output.token_ids[:-1]) if len(output.token_ids) > 3 else output

    patch.setattr(Engine, "_commit", short)


def is_off_behind_512(patch: pytest.MonkeyPatch) -> None:
    span = Engine._span

    def off(self: Engine, request: Any, draft: Any) -> Any:
        found = span(self, request, draft)
        return found._replace(start=found.start - 1) if len(draft) and found.start > 512 else found

    patch.setattr(Engine, "_span", off)


BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (masks_a_row_late, "sampled, grammar, all"),
    (writes_into_the_logits, "sampled"),
    (shows_refused_text, "greedy"),
    (hands_over_one_too_few, "greedy"),
    (is_off_behind_512, "greedy, long prompt"),
]


@pytest.mark.parametrize(("plant", "setting"), BUGS, ids=[plant.__name__ for plant, _ in BUGS])
def test_a_bug_in_the_installed_copy_is_found(
    prepared: Run, plant: Callable[[pytest.MonkeyPatch], None], setting: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        found = compared(prepared)
    assert setting in {difference.case.ask.setting for difference in found.differences}


def test_without_a_bug_nothing_differs(prepared: Run) -> None:
    found = compared(prepared)
    assert found.differences == [] and found.drafted > 0 and found.failing.total() == 0
