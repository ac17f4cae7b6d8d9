"""Bugs planted by hand in the installed package, as somebody may have them: the audit of a sound drafter finds each."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import foredraft.engine
from foredraft import LLM
from foredraft import verify as verification
from foredraft.audit import AuditOptions
from foredraft.audit.exact import Compared, compare
from foredraft.audit.pipeline import Run
from foredraft.audit.play import Subject
from foredraft.audit.subjects import find
from foredraft.engine import Engine
from foredraft.models.load import LoadOptions
from foredraft.native.choosing import Follower
from foredraft.steering import Steering
from foredraft.structured.mask import only
from foredraft.tuning.options import Watcher
from foredraft.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")
BRIEF = AuditOptions((5, None), (4,), ("leaving",), 3, 18, 500)


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


def keeps_all_behind_the_second(patch: pytest.MonkeyPatch) -> None:
    accepted = verification._acceptances
    patch.setattr(
        verification, "_acceptances", lambda draft, p: [*accepted(draft, p)[:2], *[2.0] * len(draft.tokens[2:])]
    )


def forgets_filters_under_rejection(patch: pytest.MonkeyPatch) -> None:
    restrict = verification.restrict
    patch.setattr(
        verification,
        "restrict",
        lambda s, params: restrict(s, replace(params, top_p=1.0, min_p=0.0) if len(s) > 1 else params),
    )


def halves_seeds(patch: pytest.MonkeyPatch) -> None:
    follow = Follower.__call__

    def halved(self: Follower, logits: Any, seed: int, position: int, draft: Any, *rest: Any) -> Any:
        return follow(self, logits, seed & 0xFFFFFFFF if draft else seed, position, draft, *rest)

    patch.setattr(Follower, "__call__", halved)


def loses_top_k(patch: pytest.MonkeyPatch) -> None:
    follow = Follower.__call__

    def unfiltered(self: Follower, logits: Any, seed: int, position: int, draft: Any, *rest: Any) -> Any:
        kept = self.keep.top_k
        self.keep.top_k = 0 if draft else kept
        found = follow(self, logits, seed, position, draft, *rest)
        self.keep.top_k = kept
        return found

    patch.setattr(Follower, "__call__", unfiltered)


def drops_biases_when_sampling(patch: pytest.MonkeyPatch) -> None:
    adjusted = verification._adjusted

    def unbiased(logits: Any, request: Any, rows: Any) -> Any:
        params = request.params
        if len(rows) == 1 or params.greedy:
            return adjusted(logits, request, rows)
        return verification.adjust(
            logits, request.token_ids, rows, request.prompt_len, replace(params, logit_bias={}), request.steering
        )

    patch.setattr(verification, "_adjusted", unbiased)


BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (masks_a_row_late, "sampled, grammar, all"),
    (writes_into_the_logits, "sampled"),
    (shows_refused_text, "greedy"),
    (hands_over_one_too_few, "greedy"),
    (is_off_behind_512, "greedy, long prompt"),
    (keeps_all_behind_the_second, "rejection, min_p"),
    (forgets_filters_under_rejection, "rejection, top_p"),
    (halves_seeds, "sampled"),
    (loses_top_k, "sampled, filters"),
    (drops_biases_when_sampling, "sampled, bias"),
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
