"""The result as tables, in a terminal or as Markdown. Knows nothing of how it was found."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foredraft.bench.figures import FEWEST, ArmFigures, Speedup
from foredraft.bench.measure import Difference
from foredraft.bench.prediction import Prediction
from foredraft.bench.result import Bench
from foredraft.tables import narrow_table, show_whole

SHOWN = 10  # differences
APART = 0.15  # a prediction from the measurement, from where on that is said
NO_CATEGORY = "(none)"
Rows = tuple[tuple[str, ...], ...]
MiB = 2**20


def show(found: Bench, console: Console, *, markdown: bool = False) -> None:
    """Every table that has something to say, then what tables leave to words."""
    for title, rows in tables(found):
        if markdown:
            console.print(Text(f"{title}\n\n{as_markdown(rows)}\n"), soft_wrap=True)
        else:
            console.print(Text(title, style="bold"))
            show_whole(_table(rows, label(found.best)), console)
    for line in lines(found):
        console.print(Text(f"- {line}" if markdown else line), soft_wrap=True)


def _table(rows: Rows, best: str) -> Table:
    table = narrow_table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row, style="bold" if row[0] == best else None)
    return table


def as_markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _cell(text: str) -> str:
    """What a file calls a category may hold what ends a cell, or a line."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def tables(found: Bench) -> Iterator[tuple[str, Rows]]:
    """A title, and rows of cells, the first with headers."""
    about = found.setting
    where = f"{about.dtype}, {about.device}, {about.runtime} runtime"
    yield f"{about.model}, drafted for by {found.drafter} ({where}): speed-up", _speed(found)
    yield "where the time goes", _times(found)
    if len(found.plain.categories) > 1:
        yield "speed-up by category", _categories(found)
    yield "acceptance by position: share of the drafts that reach it", _positions(found)
    if found.rouge or found.pass_rates:
        yield "quality of the answers", _quality(found)


def _speed(found: Bench) -> Rows:
    """LMFlow's columns first."""
    header = ("gamma", "speedup (inference time)", "95 %", "speed up (num of forwards)", "predicted", "tok/s")
    rows = [
        (
            label(arm),
            f"{arm.speedup.value:.2f}x",
            interval(arm.speedup, "-"),
            f"{arm.pass_speedup:.2f}x",
            _or_dash(found.predicted(arm), ".2f"),
            f"{arm.median_tokens_per_second:.1f}",
        )
        for arm in found.drafting
    ]
    return (header, ("plain", "1", "", "1", "", f"{found.plain.median_tokens_per_second:.1f}"), *rows)


def interval(speedup: Speedup, between: str) -> str:
    """A dash where there is none."""
    return "-" if speedup.bounds is None else f"{speedup.bounds[0]:.2f}{between}{speedup.bounds[1]:.2f}"


def _times(found: Bench) -> Rows:
    header = ("gamma", "per pass", "accepted", "TTFT ms", "TPOT ms", "drafting", "verifying", "other")
    return (header, *(_time_row(arm) for arm in found.arms))


def _time_row(arm: ArmFigures) -> tuple[str, ...]:
    times = arm.times
    parts = (times.drafting, times.verifying, times.other + times.outside)
    return (
        label(arm),
        f"{arm.stats.mean_acceptance_length:.2f}",
        f"{arm.stats.draft_acceptance_rate:.1%}" if arm.stats.drafted else "-",
        f"{1e3 * arm.seconds_to_first_token:.1f}",
        f"{1e3 * arm.seconds_per_token:.2f}",
        *(f"{part / times.total:.0%}" for part in parts),
    )


def _categories(found: Bench) -> Rows:
    """Spec-Bench's form: a row for each way of decoding, a column for each category."""
    names = tuple(found.plain.categories)
    rows = [
        (
            label(arm),
            *(f"{arm.categories[name].speedup:.2f}x" for name in names),
            f"{arm.stats.mean_acceptance_length:.2f}",
            f"{arm.speedup.value:.2f}x",
        )
        for arm in found.drafting
    ]
    return (("gamma", *(name or NO_CATEGORY for name in names), "#MAT", "Overall"), *rows)


def _positions(found: Bench) -> Rows:
    shown = [arm for arm in found.drafting if arm in (found.best, found.drafting[-1], _longest(found))]
    width = min(10, max(len(arm.stats.acceptance_by_position) for arm in shown))
    rows = [(label(arm), *(_or_dash(share, ".2f") for share in positions(arm, width))) for arm in shown]
    return (("gamma", *(str(i + 1) for i in range(width))), *rows)


def _longest(found: Bench) -> ArmFigures:
    return max(found.drafting, key=lambda arm: arm.num_draft_tokens or 0)


def positions(arm: ArmFigures, width: int) -> list[float | None]:
    """Acceptance at the first positions; None beyond the longest draft."""
    shares: list[float | None] = [*arm.stats.acceptance_by_position[:width]]
    return shares + [None] * (width - len(shares))


def _quality(found: Bench) -> Rows:
    """Draft & Verify's columns: quality, share of drafted tokens accepted, speed-up."""
    passes = sorted({k for rates in (found.pass_rates.by_arm.values() if found.pass_rates else ()) for k in rates})
    header = ["gamma"] + ["ROUGE-2"] * bool(found.rouge) + [f"pass@{k}" for k in passes] + ["matchness", "speed-up"]
    rows = []
    for arm in found.arms:
        cells = [f"{found.rouge.by_arm[arm.name]:.4f}"] if found.rouge else []
        if found.pass_rates:
            cells += [f"{found.pass_rates.by_arm[arm.name][k]:.3f}" for k in passes]
        matchness = f"{arm.stats.draft_acceptance_rate:.3f}" if arm.stats.drafted else "-"
        rows.append((label(arm), *cells, matchness, f"{arm.speedup.value:.3f}x"))
    return (tuple(header), *rows)


def label(arm: ArmFigures) -> str:
    """An arm in a column headed gamma."""
    return arm.name.removeprefix("gamma ")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def lines(found: Bench) -> Iterator[str]:
    """What the tables leave to words."""
    counts, about = found.counts, found.setting
    rounds = "1 round" if counts.rounds == 1 else f"{counts.rounds} rounds"
    yield (
        f"{counts.requests} requests of {counts.tasks} prompts, {counts.tokens} tokens, {rounds}; "
        f"seconds are medians over rounds, with the prompts' own; {_intervals(found)}"
    )
    yield from equality(found)
    if found.prediction:
        yield _prices(found.prediction)
    yield memory(found)
    yield from _quality_lines(found)
    versions = ", ".join(f"{name} {number}" for name, number in about.versions.items())
    yield f"ran on {about.processor}, {about.threads} threads, with {versions}"
    yield from warnings(found)


def _prices(it: Prediction) -> str:
    return (
        f"alpha {it.alpha:.3f} (per position, given all before); a draft costs {it.draft_ratio:.2f} plain steps and "
        f"{it.cost_ratio:.2f} more for each token, counting what the pass after it takes longer than without "
        "it; predicted from these"
    )


def _intervals(found: Bench) -> str:
    if found.best.speedup.bounds:
        return "intervals draw prompts anew"
    return f"no intervals: fewer than {FEWEST} prompts say nothing about others"


def equality(found: Bench) -> Iterator[str]:
    runs = found.counts.requests * found.counts.rounds * len(found.drafting)
    if found.equal is None:
        yield "tokens: not compared, as the rejection verifier keeps their distribution, not themselves"
    elif found.equal:
        yield f"tokens: equal to plain decoding's in all {runs} runs"
    else:
        yield f"tokens: DIFFERENT from plain decoding's in {len(found.differences)} runs"
        yield from (_difference(it) for it in found.differences[:SHOWN])
    if found.equal is not None and not found.promised:
        yield "exact: no, equal tokens are not promised for this model here"


def _difference(it: Difference) -> str:
    where = f"prompt {it.task} (line {it.line}), turn {it.turn}, position {it.position}"
    expected, got = ("nothing" if token is None else f"token {token}" for token in (it.expected, it.got))
    return f"  {it.arm}, round {it.round}, {where}: {expected} became {got}"


def memory(found: Bench) -> str:
    m = found.memory
    weights = f"weights {m.target_weights / MiB:.1f} MiB and {m.draft_weights / MiB:.1f} for drafting"
    caches = f"caches {m.target_cache / MiB:.1f} and {m.draft_cache / MiB:.1f}"
    peak = "" if m.peak is None else f"; peak of the {'process' if found.setting.device == 'cpu' else 'device'} "
    return f"memory: {weights}; {caches}{peak}{'' if m.peak is None else f'{m.peak / MiB:.0f} MiB'}"


def _quality_lines(found: Bench) -> Iterator[str]:
    if found.rouge:
        yield f"ROUGE-2: mean F-measure of {found.rouge.tasks} summaries, stemmed"
    rates = found.pass_rates
    if rates:
        yield f"pass@k: {rates.tasks} tasks, {rates.samples} answers each; network of the programs: {rates.network}"
        if rates.unsound:
            names = ", ".join(rates.unsound[:SHOWN])
            yield f"pass@k leaves out {len(rates.unsound)} tasks whose own reference does not pass their test: {names}"


def _apart(predicted: float | None, measured: float) -> bool:
    return predicted is not None and abs(predicted / measured - 1) > APART


def warnings(found: Bench) -> Iterator[str]:
    """What speaks against trusting these figures, or says that there could be more of them."""
    if found.load.busy:
        yield f"WARNING: the machine was busy: {found.load}; end what else runs, and measure again"
    apart = [label(arm) for arm in found.drafting if _apart(found.predicted(arm), arm.speedup.value)]
    if apart:
        yield f"predicted and measured are more than {APART:.0%} apart at gamma {', '.join(apart)}: go by the measured"
    if found.counts.left_out:
        yield f"left out: {found.counts.left_out} prompts or later turns that the context has no room for"
    if found.interrupted:
        yield "interrupted: figures are of what was measured until then, and of what was to follow some are missing"
