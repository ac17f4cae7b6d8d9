"""All that came of an audit, ready for JSON. Names neither the machine nor its user nor a path."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from foredraft.audit import casefile
from foredraft.audit.distribution import Tested
from foredraft.audit.exact import Compared, Difference
from foredraft.audit.options import AuditOptions
from foredraft.diagnosis.setting import Setting

Status = Literal[
    "passed", "failed", "not compared", "controls missed", "nothing drafted", "rejection not tried", "interrupted"
]


@dataclass(frozen=True, slots=True)
class Checked:
    """One drafter: texts against plain decoding, and the distribution under rejection sampling."""

    drafter: str
    flag: str  # what the command line calls it
    model_hash: str  # of a draft model; empty for others
    compared: Compared
    tested: Tested | None  # None: interrupted before
    complete: bool

    @property
    def passed(self) -> bool:
        found = self.compared
        equal = found.drafted > 0 and not found.differences and not found.unproven
        return self.complete and equal and self.tested is not None and self.tested.passed

    @property
    def state(self) -> str:
        """In a few words; where it passed, also what was not shown of it."""
        if self.passed:
            lacking = self.tested.lacking if self.tested else ""
            return f"equal; rejection sampling not shown ({lacking})" if lacking else "equal"
        if not self.complete:
            return "not done"
        if self.compared.unproven and not self.compared.differences:
            return "not compared"
        return "FAILED" if self.compared.drafted else "never drafted"


@dataclass(frozen=True, slots=True)
class Planted:
    """A control: whether the audit's checks caught it, and by what."""

    name: str
    kind: str
    caught: bool | None  # None: it cannot be planted here
    by: str


@dataclass(frozen=True, slots=True)
class Failure:
    """The smallest case of a difference, and the drafter that it was found with (the command line's name)."""

    drafter: str
    flag: str
    difference: Difference
    repeats: bool = True  # whether the case, replayed as it is printed, failed again

    @property
    def case(self) -> str:
        return casefile.dumps(self.difference.case)


@dataclass(frozen=True, slots=True)
class Audit:
    setting: Setting
    model_hash: str  # of the configuration and a sample of the weights
    options: AuditOptions
    promised: bool  # whether passes agree bit for bit here, as the load-time probe found
    checked: tuple[Checked, ...]
    left_out: Mapping[str, str]  # drafters that cannot draft for this model, and why
    controls: tuple[Planted, ...]
    failure: Failure | None
    complete: bool

    @property
    def status(self) -> Status:
        """Only a run that is complete, with all its controls caught, can pass."""
        if any(it.compared.differences or (it.tested and not it.tested.passed) for it in self.checked):
            return "failed"
        if not self.complete or not self.checked:
            return "interrupted"
        if any(it.compared.unproven for it in self.checked):
            return "not compared"
        if not self.controls or any(it.caught is False for it in self.controls):
            return "controls missed"
        if not all(it.passed for it in self.checked):
            return "nothing drafted"
        return "passed" if any(it.tested and it.tested.drafted for it in self.checked) else "rejection not tried"

    @property
    def not_shown(self) -> dict[str, str]:
        """Drafters of which the test of rejection sampling says nothing, and why."""
        return {it.drafter: it.tested.lacking for it in self.checked if it.tested and it.tested.lacking}

    @property
    def guarantees(self) -> tuple[str, ...]:
        """What holds here, in words."""
        if self.status != "passed":
            return ()
        texts = "greedy and coupled decoding give plain decoding's tokens and logits, bit for bit"
        if not self.promised:
            texts = "greedy and coupled decoding gave plain decoding's tokens in every case tried; it is not promised"
        shown = [it.drafter for it in self.checked if it.drafter not in self.not_shown]
        if not shown:
            return (texts, "rejection sampling was not shown: no drafter's drafts were both accepted and refused")
        whose = f" with {', '.join(shown)}" if self.not_shown else ""
        return (
            texts,
            f"rejection sampling draws from the target's distribution{whose} ({self.options.alarm:.1%} false alarms)",
        )

    def as_dict(self) -> dict[str, Any]:
        options = asdict(self.options)
        options["own"] = len(self.options.own)
        return {
            "status": self.status,
            "guarantees": list(self.guarantees),
            "setting": asdict(self.setting) | {"model_hash": self.model_hash},
            "options": options,
            "promised": self.promised,
            "drafters": [_checked(it) for it in self.checked],
            "left_out": dict(self.left_out),
            "controls": [asdict(it) for it in self.controls],
            "failure": self.failure and _failure(self.failure),
        }


def _checked(it: Checked) -> dict[str, Any]:
    found = it.compared
    counts = {name: getattr(found, name) for name in ("runs", "requests", "tokens", "drafted", "accepted")}
    failing = {"not_compared": found.uncompared, "unproven": found.unproven, "error": found.error}
    return {
        "drafter": it.drafter,
        "model_hash": it.model_hash,
        "passed": it.passed,
        "status": it.state,
        "compared": counts | {"differences": len(found.differences)} | failing,
        "distribution": it.tested and asdict(it.tested) | {"passed": it.tested.passed, "telling": it.tested.telling},
    }


def _failure(failure: Failure) -> dict[str, Any]:
    found = failure.difference
    where = {name: getattr(found, name) for name in ("what", "position", "expected", "got")}
    return {"drafter": failure.drafter, **where, "repeats": failure.repeats, "case": failure.case}
