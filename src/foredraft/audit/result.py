"""All that came of an audit, ready for JSON. Names neither the machine nor its user nor a path."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from foredraft.audit import casefile
from foredraft.audit.distribution import Tested
from foredraft.audit.exact import Compared, Difference
from foredraft.audit.options import AuditOptions
from foredraft.diagnosis.setting import Setting

Status = Literal["passed", "failed", "not compared", "controls missed", "nothing drafted", "interrupted"]


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
        return "passed" if all(it.passed for it in self.checked) else "nothing drafted"

    @property
    def guarantees(self) -> tuple[str, ...]:
        """What holds here, in words."""
        if self.status != "passed":
            return ()
        texts = "greedy and coupled decoding give plain decoding's tokens and logits, bit for bit"
        if not self.promised:
            texts = "greedy and coupled decoding gave plain decoding's tokens in every case tried; it is not promised"
        if not any(it.tested and it.tested.telling for it in self.checked):
            return (texts, "rejection sampling was not tried: no drafter's drafts were both accepted and refused")
        return (
            texts,
            f"rejection sampling draws from the target's distribution ({self.options.alarm:.1%} false alarms)",
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
        "compared": counts | {"differences": len(found.differences)} | failing,
        "distribution": it.tested and asdict(it.tested) | {"passed": it.tested.passed, "telling": it.tested.telling},
    }


def _failure(failure: Failure) -> dict[str, Any]:
    found = failure.difference
    where = {name: getattr(found, name) for name in ("what", "position", "expected", "got")}
    return {"drafter": failure.drafter, **where, "case": failure.case}
