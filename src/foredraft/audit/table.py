"""An audit as tables for a terminal."""

import shlex

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foredraft.audit.distribution import Tested
from foredraft.audit.exact import Compared
from foredraft.audit.options import AuditOptions
from foredraft.audit.result import Audit, Checked, Failure, Planted
from foredraft.tables import narrow_table, show_whole


def show(found: Audit, console: Console, command: str) -> None:
    """`command` is what the user typed as far as it loads the models; a case is added to it."""
    it = found.setting
    console.print(f"{it.model} ({found.model_hash}), {it.dtype}, {it.device}, {it.runtime} runtime")
    console.print("Drafting against plain decoding", style="bold")
    show_whole(drafters(found), console)
    for name, reason in found.left_out.items():
        console.print(f"left out: {name}: {reason}", style="dim", soft_wrap=True)
    if found.controls:
        console.print("Planted bugs", style="bold")
        show_whole(controls(found), console)
    _conclude(found, console, command)


def drafters(found: Audit) -> Table:
    failing = any(it.compared.uncompared for it in found.checked)
    table = narrow_table("drafter")
    for name in ("runs", "requests", "tokens", "drafted", "accepted", "differ"):
        table.add_column(name, justify="right")
    for name in ("not compared",) * failing + ("p of rejection",):
        table.add_column(name, justify="right")
    table.add_column("")
    for it in found.checked:
        table.add_row(*_row(it, failing=failing))
    return table


def _row(it: Checked, *, failing: bool) -> tuple[str | Text, ...]:
    found = it.compared
    share = f"{found.accepted / found.drafted:.0%}" if found.drafted else "-"
    p = "-" if it.tested is None else _p(it.tested)
    numbers = (found.runs, found.requests, found.tokens, found.drafted)
    uncompared = (str(found.uncompared),) * failing
    return (it.drafter, *(f"{n:,}" for n in numbers), share, str(len(found.differences)), *uncompared, p, _state(it))


def _p(tested: Tested) -> str:
    """A lookup that found nothing in so short a text has a p that says nothing."""
    return tested.error or (tested.lacking if tested.passed else "") or f"{tested.p_value:.3f}"


def _state(it: Checked) -> Text:
    word = it.state.partition(";")[0]  # what was not shown is in place of its p
    return Text(word, "green" if it.passed else "yellow" if word == "not done" else "red")


def controls(found: Audit) -> Table:
    table = narrow_table("bug", "check", "", "by")
    for it in found.controls:
        table.add_row(it.name, it.kind, _verdict(it), it.by)
    return table


def _verdict(it: Planted) -> Text:
    if it.caught is None:
        return Text("not planted", "yellow")
    return Text("caught", "green") if it.caught else Text("MISSED", "red")


def _failing(found: Compared) -> str:
    where = f"; too many in: {', '.join(found.unproven)}" if found.unproven else ""
    return f"{found.uncompared} requests fail with and without drafts ({found.error}), not compared beyond that{where}"


def _why(tested: Tested) -> str:
    if tested.error:
        return f"rejection sampling fails ({tested.error})"
    return (
        f"{tested.samples:,} texts of rejection sampling are not the target's distribution (p = {tested.p_value:.1e})"
    )


def _show_command(console: Console, command: str, draft: str, flags: str) -> None:
    console.print(f"{command} --draft {shlex.quote(draft)} {flags}", soft_wrap=True, markup=False, highlight=False)


def _show_failure(failure: Failure, console: Console, command: str) -> None:
    difference = failure.difference
    end = "It repeats with" if failure.repeats else "It could not be repeated; with --case this may show nothing:"
    console.print(
        f"first difference: {failure.drafter}, {difference.what} at output position {difference.position}: "
        f"plain decoding has {difference.expected}, drafting {difference.got}. {end}",
        style="red",
        soft_wrap=True,
        markup=False,
    )
    if failure.repeats:
        _show_command(console, command, failure.flag, f"--case {shlex.quote(failure.case)}")
    else:
        console.print(failure.case, soft_wrap=True, markup=False, highlight=False)


def _show_failures(found: Audit, console: Console, command: str) -> None:
    if found.failure is not None:
        _show_failure(found.failure, console, command)
    for it in found.checked:
        if it.tested is not None and not it.tested.passed:
            console.print(f"{it.drafter}: {_why(it.tested)}. It repeats with", style="red", soft_wrap=True)
            quick = " --quick" if found.options.samples < AuditOptions().samples else ""
            _show_command(console, command, it.flag, f"--seed {found.options.seed}{quick}")
    for it in found.checked:
        if it.compared.uncompared:
            console.print(f"{it.drafter}: {_failing(it.compared)}", style="yellow", soft_wrap=True, markup=False)


def _conclude(found: Audit, console: Console, command: str) -> None:
    _show_failures(found, console, command)
    caught = sum(it.caught is True for it in found.controls)
    planted = sum(it.caught is not None for it in found.controls)
    lacking = ", ".join(f"{name} ({why})" for name, why in found.not_shown.items())
    but = f"; rejection sampling not shown of {lacking}" if lacking else ""
    words = {
        "passed": f"PASSED: {caught} of {planted} planted bugs caught, no difference{but}",
        "failed": "FAILED: drafting changes something here",
        "not compared": "FAILED: too many requests fail with and without drafts, so nothing was shown of them",
        "controls missed": f"FAILED: only {caught} of {planted} planted bugs were caught, so equality proves nothing",
        "nothing drafted": "FAILED: a drafter never drafted, so nothing was shown of it",
        "rejection not tried": "FAILED: texts are equal, but nothing was drafted under rejection sampling, so nothing "
        "was shown of it",
        "interrupted": "INTERRUPTED: what is incomplete cannot pass",
    }
    console.print(words[found.status], style="bold green" if found.status == "passed" else "bold red")
    for guarantee in found.guarantees:
        console.print(f"here {guarantee}", soft_wrap=True)
