"""From timed steps to costs, and how sure they are. Arithmetic only.

A draft with skipped sub-layers is priced by a fit, fixed + tokens * (base + attentions + MLPs), so that no candidate
has to be timed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from foredraft.models.rows import PREFILL_CHUNK
from foredraft.tuning.costs import Costs, DraftCost, StepCosts, SublayerCosts, Timed, Timings, Turn
from foredraft.tuning.machine import UNWATCHED, Load

QUANTILE = 0.3  # of a turn's timings: robust against what else the machine does
FEWEST = 4  # timings that tell anything
WIDE = 0.05  # a relative error beyond which a turn is timed again
PLAIN, REPEAT = "plain", "repeat"
FREE = (PLAIN, REPEAT)  # turns whose drafts cost nothing


def fit(found: Timings, prompts: Sequence[int], load: Load = UNWATCHED) -> Costs:
    """From timed steps to costs, of texts with prompts of so many tokens.

    The price of verifying comes from steps whose drafts cost nothing. A draft's price is what its steps take beyond
    that: it includes the time that the target loses because drafting displaced its data from the caches.
    """
    free: list[Timed] = []
    drafted: list[Timed] = []
    for it in found.steps:
        (free if it.turn.name in FREE else drafted).append(it)
    steps = _steps(free, _prefill(found.prefills, prompts), _low(found.around) if found.around else 0.0)
    beyond = [(it, it.times.total - steps.step(it.times.drafted)) for it in drafted if it.times.drafted]
    names = {it.turn.name for it, _ in beyond}
    families = {it.turn.weights for it, _ in beyond if it.turn.weights}
    lines = {name: _line([pair for pair in beyond if pair[0].turn.name == name]) for name in sorted(names)}
    return Costs(
        steps,
        {name: replace(it, start=_start(name, it, steps, found.starts, prompts)) for name, it in lines.items()},
        {name: _plane([pair for pair in beyond if pair[0].turn.weights == name]) for name in sorted(families)},
        _errors(found.steps),
        load,
    )


def _prefill(passes: Sequence[tuple[int, float]], prompts: Sequence[int]) -> float:
    """The mean over the prompts; a long one takes several passes, of which only the last is timed."""
    cells = _cells(passes)
    if not cells:
        return 0.0
    tokens = np.array(list(cells), dtype=float)
    fixed, token = _least_squares(np.stack([np.ones_like(tokens), tokens], 1), list(cells.values()))
    return _mean([fixed * -(-count // PREFILL_CHUNK) + token * count for count in prompts])


def _start(name: str, draft: DraftCost, steps: StepCosts, starts: Iterable[Timed], prompts: Sequence[int]) -> float:
    """What a drafter's first step in a text takes beyond a later one, by the tokens that it reads."""
    beyond = [
        (it.times.total - steps.step(it.times.drafted) - draft.seconds(it.times.drafted)) / it.behind
        for it in starts
        if it.turn.name == name
    ]
    return max(0.0, _low(beyond)) * _mean(prompts) if beyond else 0.0


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / max(1, len(values)))


def _errors(timed: Iterable[Timed]) -> dict[str, float]:
    """By turn's name, and by the weights of a fit: the error of what is known worst."""
    worst: dict[str, float] = {}
    for (turn, _), values in _seen(timed).items():
        for name in {turn.name, turn.weights} - {REPEAT, ""}:
            worst[name] = max(worst.get(name, 0.0), error(values))
    return worst


def _seen(timed: Iterable[Timed]) -> dict[tuple[Turn, int], list[float]]:
    """Seconds of steps by turn and tokens drafted; what was seen too seldom to enter a price is left out."""
    found: dict[tuple[Turn, int], list[float]] = {}
    for it in timed:
        found.setdefault((it.turn, it.times.drafted), []).append(it.times.total)
    enough = _enough(found.values())
    return {key: values for key, values in found.items() if len(values) >= enough}


def error(values: Sequence[float]) -> float:
    """The standard error of these timings' low quantile, over that quantile.

    sqrt(p (1 - p) / n) / density, the density there estimated from the distance of the quantiles 0.1 and
    0.5. Large if there are few timings or they scatter.
    """
    if len(values) < FEWEST:
        return 1.0
    least, low, middle = (float(np.quantile(values, q)) for q in (0.1, QUANTILE, 0.5))
    return float((QUANTILE * (1 - QUANTILE) / len(values)) ** 0.5 * (middle - least) / 0.4 / max(low, 1e-9))


def too_wide(timed: Iterable[Timed]) -> list[Turn]:
    """Turns whose timings scatter so much that they are worth more of them."""
    return list(dict.fromkeys(turn for (turn, _), values in _seen(timed).items() if error(values) > WIDE))


def _low(values: Sequence[float]) -> float:
    return float(np.quantile(values, QUANTILE))


def _cells(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    """The low quantile of each key's values, for keys that were seen often enough."""
    found: dict[Any, list[float]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    enough = _enough(found.values())
    return {key: _low(values) for key, values in sorted(found.items()) if len(values) >= enough}


def _enough(values: Iterable[Sequence[float]]) -> float:
    return min(6, max(map(len, values), default=0) / 4)


def _steps(free: Iterable[Timed], prefill: float, around: float) -> StepCosts:
    """Seconds by tokens drafted; made to rise with them, since a wider pass never costs less."""
    cells = _cells((it.times.drafted, it.times.total - it.times.drafting) for it in free)
    seconds = np.maximum.accumulate(list(cells.values())).tolist()
    return StepCosts(tuple(cells), tuple(seconds), prefill, around)


def _line(beyond: Sequence[tuple[Timed, float]]) -> DraftCost:
    cells = _cells((it.times.drafted, seconds) for it, seconds in beyond)
    x = np.array(list(cells))
    fixed, token = _least_squares(np.stack([np.ones_like(x), x], 1), list(cells.values()))
    return DraftCost(fixed, token)


def _plane(beyond: Sequence[tuple[Timed, float]]) -> SublayerCosts:
    """fixed + d (token + attentions * a + mlps * m)"""
    cells = _cells(((it.times.drafted, it.turn.attentions, it.turn.mlps), seconds) for it, seconds in beyond)
    d, a, m = np.array(list(cells)).T
    fixed, token, attention, mlp = _least_squares(np.stack([np.ones_like(d), d, d * a, d * m], 1), list(cells.values()))
    return SublayerCosts(fixed, token, attention, mlp)


def _least_squares(columns: Any, values: Sequence[float]) -> list[float]:
    """Coefficients with the least relative error and none below 0: columns that would get less are left out."""
    y = np.maximum(np.asarray(values, dtype=float), 1e-6)
    scaled = columns / y[:, None]
    active = list(range(columns.shape[1]))
    while active:
        found = np.linalg.lstsq(scaled[:, active], np.ones_like(y), rcond=None)[0]
        if (found >= 0).all():
            break
        active.pop(int(np.argmin(found * np.abs(scaled[:, active]).mean(0))))
    result = [0.0] * columns.shape[1]
    for place, value in zip(active, found if active else [], strict=True):
        result[place] = float(value)
    return result
