"""The result as pictures: SVG drawn by matplotlib (extra `bench`), whose colours are variables of the page around it.

Every colour is drawn as a stand-in, then becomes `var(--name)`, so that one picture serves light and dark pages. Text
stays text. Knows nothing of the page but those names.
"""

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

from foredraft.bench.figures import ArmFigures
from foredraft.bench.measure import PLAIN
from foredraft.bench.options import POLICY
from foredraft.bench.result import Bench
from foredraft.errors import ForedraftError, missing_extra

NAMES = ("ink", "muted", "grid", "card", "fast", "draft", "plain", "extra")
COLOURS = {name: f"#0{i}0b0c" for i, name in enumerate(NAMES)}  # stand-ins, which nothing else is drawn in
INK, MUTED, GRID, CARD, FAST, DRAFT, PLAIN_COLOUR, EXTRA = COLOURS.values()
WIDTH, HEIGHT = 6.4, 3.7  # inches
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
}


def check_plots() -> None:
    """Raises ForedraftError where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ForedraftError(missing_extra("--html needs", "matplotlib", "bench")) from error


def plots(found: Bench) -> Iterator[tuple[str, str, str]]:
    """A title, a sentence and an SVG for each picture."""
    fixed = [arm for arm in found.drafting if arm.num_draft_tokens is not None]
    best = found.best
    yield (
        "Speed-up by draft length",
        "Against plain decoding on the same prompts."
        + (" Bars: 95 % of what other prompts like these would give." if best.speedup.bounds else ""),
        _svg("speed", lambda figure: _speed(figure, found, fixed)),
    )
    yield (
        "Acceptance by position",
        "Of the drafts that reach a position, the share whose token there was the target's own.",
        _svg("acceptance", lambda figure: _acceptance(figure.subplots(), found)),
    )
    yield (
        "Where the time goes",
        "Milliseconds for each token, prompts included.",
        _svg("time", lambda figure: _times(figure.subplots(), found), rows=len(found.arms)),
    )
    yield (
        "Tokens over time",
        f"One request: each step of plain decoding brings a token, of {_label(best)} up to {_most(best)}.",
        _svg("tokens", lambda figure: _tokens(figure.subplots(), found)),
    )


def _svg(name: str, draw: Callable[[Any], None], rows: int = 0) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {**STYLE, "svg.hashsalt": f"foredraft {name}"}
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, max(HEIGHT, 0.28 * rows)), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _themed(out.getvalue())


def _themed(svg: str) -> str:
    """The picture alone, in the page's colours, without names that another picture has as well."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"""(?:href="#|url\(#)([^")]+)""", svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    for name, stand_in in COLOURS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return svg


def _speed(figure: Any, found: Bench, fixed: list[ArmFigures]) -> None:
    """Time on the left, passes of the target on the right: what drafting and wider passes cost lies between them."""
    left, right = figure.subplots(1, 2, width_ratios=(5, 3))
    lengths = [arm.num_draft_tokens for arm in fixed]
    values = [arm.speedup.value for arm in fixed]
    bounds = [it.speedup.bounds or (it.speedup.value, it.speedup.value) for it in fixed]
    spread = [
        [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)],
    ]
    left.axhline(1, color=PLAIN_COLOUR, linewidth=1.2, linestyle=(0, (2, 2)))
    if fixed:
        left.errorbar(
            lengths, values, yerr=spread, color=FAST, marker="o", markersize=5, elinewidth=1.4, label="measured"
        )
    predicted = [(arm.num_draft_tokens, found.predicted(arm)) for arm in fixed if found.predicted(arm) is not None]
    if predicted:
        left.plot(*zip(*predicted, strict=True), color=EXTRA, linewidth=1.4, linestyle="--", label="predicted")
    for arm in found.drafting:
        if arm.name == POLICY:
            left.axhline(arm.speedup.value, color=DRAFT, linewidth=1.6, label="policy's choice")
    left.set(title="in time", xlabel="tokens a draft")
    figure.legend(fontsize=9, handlelength=1.6, ncols=3, loc="outside lower left")
    if fixed:
        right.plot(lengths, [arm.pass_speedup for arm in fixed], color=FAST, marker="o", markersize=4)
    right.axhline(1, color=PLAIN_COLOUR, linewidth=1.2, linestyle=(0, (2, 2)))
    right.set(title="in passes of the target", xlabel="tokens a draft", ylim=(0, None))
    for axes in (left, right):
        _whole(axes)


def _acceptance(axes: Any, found: Bench) -> None:
    longest = max(found.drafting, key=lambda arm: arm.num_draft_tokens or 0)
    policy = [arm for arm in found.drafting if arm.name == POLICY]
    shown = list(dict.fromkeys(arm.name for arm in [longest, found.best, *policy]))
    colours = dict(zip(shown, (FAST, EXTRA, DRAFT), strict=False))
    for arm in found.drafting:
        shares = arm.stats.acceptance_by_position
        if arm.name in colours and shares:
            axes.plot(
                range(1, len(shares) + 1), shares, color=colours[arm.name], marker="o", markersize=4, label=_label(arm)
            )
    axes.set(xlabel="position in the draft", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if axes.lines:  # a drafter may have had nothing to say
        axes.legend(fontsize=9)
    _whole(axes)


def _times(axes: Any, found: Bench) -> None:
    tokens = found.plain.times.total and found.counts.tokens
    arms = found.arms[::-1]
    left = [0.0] * len(arms)
    for part, colour in (("drafting", DRAFT), ("verifying", FAST), ("other", PLAIN_COLOUR)):
        widths = [1e3 * _part(arm, part) / tokens for arm in arms]
        label = "target" if part == "verifying" else part
        axes.barh([_label(arm) for arm in arms], widths, left=left, color=colour, height=0.68, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="ms for each token")
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))


def _part(arm: ArmFigures, part: str) -> float:
    return float(getattr(arm.times, part)) + (arm.times.outside if part == "other" else 0.0)


def _tokens(axes: Any, found: Bench) -> None:
    colours = {PLAIN: PLAIN_COLOUR}
    for name, steps in found.timeline.items():
        seconds, counts = zip(*[(0.0, 0), *steps], strict=True)
        axes.step([1e3 * it for it in seconds], counts, where="post", color=colours.get(name, FAST), label=name)
    axes.set(xlabel="ms since the request", ylabel="tokens", xlim=(0, None), ylim=(0, None))
    axes.legend(fontsize=9, loc="lower right")


def _whole(axes: Any) -> None:
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))


def _label(arm: ArmFigures) -> str:
    return "the policy" if arm.name == POLICY else arm.name


def _most(arm: ArmFigures) -> int:
    return len(arm.stats.drafted_at) + 1
