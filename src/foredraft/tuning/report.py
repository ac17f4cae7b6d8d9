"""The advice as a table and as plots. Knows nothing of how it was found."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from foredraft.errors import ForedraftError, missing_extra
from foredraft.tuning.carousel import REPEATS
from foredraft.tuning.fitting import WIDE
from foredraft.tuning.ranking import WORTH, Advice, Row

HEADERS = ("drafter", "alpha", "cost", "+-", "length", "per pass", "predicted", "measured", "range", "MiB", "tokens")


def render(advice: Advice) -> RenderableType:
    """The table of drafters, what each skips, and the recommendation."""
    title = f"drafters for {advice.model}" if advice.model else None
    table = Table(*HEADERS, title=title, box=SIMPLE, padding=0, pad_edge=False, title_justify="left")
    best = advice.recommended
    for row in advice.rows:
        table.add_row(*_cells(row), style="bold" if row is best else None)
    for name in advice.refused:
        table.add_row(name, *["-"] * (len(HEADERS) - 1), style="dim")
    return Group(table, *(Text(line) for line in lines(advice)))


def show(advice: Advice, console: Console) -> None:
    console.print(render(advice))


def lines(advice: Advice) -> Iterator[str]:
    """What the table leaves to words."""
    yield from (f"{name} cannot serve: {reason}" for name, reason in advice.refused.items())
    for row in advice.rows:
        if row.skip is not None:
            skipped = f"attention {_list(row.skip.attention)}, MLP {_list(row.skip.mlp)}"
            yield f"{row.name} leaves out {len(row.skip)} sub-layers: {skipped}"
    yield from _vocabularies(advice)
    yield from _warnings(advice)
    best = advice.recommended
    if best is None:
        yield "recommended: plain decoding; no drafter makes this model faster here"
    else:
        kind = "measured" if best.measured else "predicted"
        yield (
            f"recommended: {best.name}, {best.forecast.gamma} tokens a draft, "
            f"{best.speedup:.2f} times plain decoding ({kind})"
        )


def _vocabularies(advice: Advice) -> Iterator[str]:
    """What drafters with tokens of their own share with the target, and whether that is enough."""
    for row in advice.rows:
        if row.translated is None:
            continue
        yield f"{row.name} has another vocabulary: {row.translated.overlap}"
        if row.translated.at_best < WORTH:
            yield (
                f"WARNING: {row.name}: so little shared cannot pay: at alpha {row.alpha:.2f} not even a free draft "
                f"would gain {WORTH - 1:.0%}; use a draft that agrees with the target more often"
            )
        elif row.speedup < WORTH:
            yield (
                f"WARNING: {row.name} cannot pay here: with translation a draft token costs {row.cost_ratio:.2f} plain "
                f"steps, and were it free the gain would be {row.translated.at_best:.2f}; use a smaller draft model"
            )


def _warnings(advice: Advice) -> Iterator[str]:
    """Why these figures may be wrong."""
    for when, load in (("costs were measured", advice.costs.load), ("speed-ups were confirmed", advice.load)):
        if load.busy:
            yield f"WARNING: the machine was busy while {when}: {load}; end what else runs, and tune again"
    for row in advice.rows:
        if row.disagrees:
            yield f"WARNING: {row.name}: prediction and measurement are more than a quarter apart; trust neither"
    wide = [f"{row.name} {row.cost_error:.0%}" for row in advice.rows if row.cost_error > WIDE]
    if wide:
        yield f"WARNING: costs still scatter after {REPEATS} more measurements: {', '.join(wide)}"


def _cells(row: Row) -> tuple[str, ...]:
    measured = row.measured
    return (
        row.name,
        f"{row.alpha:.3f}",
        f"{row.cost_ratio:.3f}",
        f"{row.cost_error:.0%}",
        str(row.forecast.gamma),
        f"{row.forecast.tokens_per_pass:.2f}",
        f"{row.forecast.speedup:.2f}",
        f"{measured.speedup:.2f}" if measured else "-",
        f"{measured.low:.2f}-{measured.high:.2f}" if measured else "-",
        f"{row.memory / 2**20:.1f}" if row.memory else "-",
        ("equal" if measured.equal else "DIFFERENT") if measured else "-",
    )


def _list(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers)) or "none"


def plot(advice: Advice, path: Path) -> None:
    """Search history, and speed-up by draft length of every drafter, as a picture.

    Raises:
        ForedraftError: matplotlib is not installed, or cannot write there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ForedraftError(missing_extra("--plot needs", "matplotlib", "tune")) from error
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _history(left, advice)
    _lengths(right, advice)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ForedraftError(f"the plot cannot be written to {path}: {error}") from error


def _history(axes: Any, advice: Advice) -> None:
    for i, (name, trials) in enumerate(advice.trials.items()):
        speedups = [trial.speedup for trial in trials]
        best = [max(speedups[: n + 1]) for n in range(len(speedups))]
        axes.scatter(range(1, len(speedups) + 1), speedups, s=6, alpha=0.4, color=f"C{i}")
        axes.step(range(1, len(best) + 1), best, where="post", color=f"C{i}", label=f"{name}, best so far")
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set(title="search", xlabel="trial", ylabel="predicted speed-up")
    if advice.trials:
        axes.legend(loc="lower right")


def _lengths(axes: Any, advice: Advice) -> None:
    for i, row in enumerate(advice.rows):
        lengths = range(len(row.forecast.by_length))
        axes.plot(lengths, row.forecast.by_length, color=f"C{i}", marker=".", label=Path(row.name).name)
        if row.measured:
            error = [[row.speedup - row.measured.low], [row.measured.high - row.speedup]]
            spread = [[max(0.0, side[0])] for side in error]
            axes.errorbar([row.forecast.gamma], [row.speedup], yerr=spread, color=f"C{i}", marker="D", capsize=3)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set(title="speed-up by draft length (diamonds: measured)", xlabel="tokens a draft", ylabel="speed-up")
    axes.legend()
