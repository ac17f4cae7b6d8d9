"""What an audit prints repeats: a case has the drafts that its requests got, and is replayed before it is printed."""

from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
from models import tiny

import foredraft.engine
from foredraft import LLM, SamplingParams
from foredraft.audit import AuditOptions, audit, casefile, shrink
from foredraft.audit.asks import Ask, asks
from foredraft.audit.exact import Case
from foredraft.audit.play import Outcome, Subject, play
from foredraft.audit.recorded import Drafted
from foredraft.audit.subjects import find
from foredraft.audit.table import show
from foredraft.cli.console import stdout_console
from foredraft.models.load import LoadOptions
from foredraft.policy import Fixed
from foredraft.tuning.options import Watcher
from foredraft.types import Request
from foredraft.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")
BRIEF = AuditOptions((None,), (3,), ("leaving",), 2, 20, 500)
WIDE = 5


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny("llama"), "none", max_batch_size=4)


class Moody(Fixed):
    """Drafts of other lengths each time it is asked, as with measured times."""

    moods = cycle([3, 1, 4, 0, WIDE, 2, 7, 4, 3])

    def start(self, request: Request) -> int:
        return next(self.moods)


def wrong_when_wide(draft: Any, logits: Any, request: Any) -> Any:
    """Keeps one token too many of drafts of one length, which a policy may make or not."""
    verdict = verify(draft, logits, request)
    if len(draft) != WIDE:
        return verdict
    return replace(verdict, accepted=tuple(range(min(len(verdict.accepted) + 1, len(draft)))))


def test_what_was_found_under_the_policy_repeats(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed case had no draft lengths, and those of its replay came from other times."""
    audited, _ = find(llm, ["int4"], LoadOptions(), bundled=False)
    monkeypatch.setattr(Subject, "make_policy", lambda self: Moody() if self.policy is None else Fixed())
    monkeypatch.setattr(foredraft.engine, "verify", wrong_when_wide)
    found = audit(llm, audited, BRIEF)
    assert found.failure and found.failure.repeats
    case = casefile.loads(found.failure.case)
    assert (len(case.asks), case.ask.num_draft_tokens) == (1, None)
    assert WIDE in {it.length for it in case.ask.drafts}
    for _ in range(3):
        assert shrink.replay(llm, Subject(audited[0].drafter), case)
    show(found, stdout_console(width=200), "foredraft audit")
    assert "It repeats with" in capsys.readouterr().out
    monkeypatch.setattr(foredraft.engine, "verify", verify)
    assert shrink.replay(llm, Subject(audited[0].drafter), case) is None


def test_what_does_not_repeat_is_not_said_to(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audited, _ = find(llm, ["int4"], LoadOptions(), bundled=False)
    monkeypatch.setattr(foredraft.engine, "verify", wrong_when_wide)

    def heal(text: str, steps: int) -> None:
        if "smallest" in text:
            monkeypatch.setattr(foredraft.engine, "verify", verify)

    found = audit(llm, audited, replace(BRIEF, lengths=(WIDE,)), watcher=Watcher(stage=heal))
    assert found.status == "failed" and found.failure and not found.failure.repeats
    assert found.as_dict()["failure"]["repeats"] is False
    assert casefile.loads(found.failure.case)  # of which more can be made by hand
    show(found, stdout_console(width=200), "foredraft audit")
    shown = capsys.readouterr().out
    assert "could not be repeated" in shown and '{"format":1' in shown and "--case '" not in shown


def made(outcome: Outcome) -> list[tuple[int, str]]:
    return [(it.length, it.source if it.length else "") for it in outcome.drafts]


@pytest.mark.parametrize("name", ["model", "int4", "suffix,model"])
def test_recorded_drafts_are_made_again(name: str) -> None:
    bundled = LLM(draft="none")
    (audited,), _ = find(bundled, [name], LoadOptions(), bundled=True)
    subject = Subject(audited.drafter)
    crowd = [replace(ask, num_draft_tokens=None, memory=None) for ask in asks(bundled, BRIEF)[:12]]
    first = play(bundled, subject, crowd, 3)
    again = play(bundled, subject, [replace(a, drafts=o.drafts) for a, o in zip(crowd, first, strict=True)], 3)
    assert any(it.length for outcome in first for it in outcome.drafts)
    assert [made(it) for it in again] == [made(it) for it in first]
    assert [it.tokens for it in again] == [it.tokens for it in first]


def test_drafts_are_printed_with_their_case() -> None:
    drafts = (Drafted(0, 0, "none"), Drafted(16, 3, "forced+suffix"))
    ask = Ask((1, 2), SamplingParams(seed=0), "greedy", None, drafts=drafts)
    case = Case((ask,), 1, 0, warm=True)
    assert casefile.loads(casefile.dumps(case)) == case
    with pytest.raises(Exception, match="the case is not usable"):
        casefile.loads(casefile.dumps(case).replace("[16,3,", "[16,"))
