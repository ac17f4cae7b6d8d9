"""What steps cost, measured as they run: averages that forget, a line through passes, prices by batch size.

Knows seconds and counts; nothing of drafters or of how sure they are.
"""

from dataclasses import dataclass, field

from foredraft.policy.base import StepTimes

PLAIN_EVERY = 192  # steps; of so many a few are plain, so that the price of plain decoding stays known
PLAIN_FIRST = 64  # steps before it is measured again; each wait is twice the last
FEW = 4  # measurements; from then on one that is far too long is not believed
LEAST = 0.01  # of what a unit costs on average: what one more costs at least
PLAIN_RUN = 2  # of which the first is not counted: a drafter's weights have pushed the target's out of the caches


@dataclass(slots=True)
class Average:
    """An exponential moving average that starts as the plain mean."""

    value: float = 0.0
    count: int = 0
    memory: int = 40

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, self.memory)

    def add_cost(self, value: float) -> None:
        """Add a time; one that is far too long, because something else ran, counts as twice the average."""
        self.add(min(value, 2 * self.value) if self.count >= FEW and self.value else value)


@dataclass(slots=True)
class Line:
    """A line fitted to seconds over a count, the rows of a pass or the tokens of a draft: least squares that forget.

    While the counts hardly differ they say little of the slope, and it moves but slowly from what it was. Nothing costs
    less than nothing: the line never meets zero to the right of it, and never falls.
    """

    before: float | None = None  # the slope until counts have differed; None: half of what a unit costs
    decay: float = 0.99
    n: float = 0.0  # points, and sums over them: counts x, seconds y, and their products
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    slope: float = 0.0  # seconds that one more costs

    def __post_init__(self) -> None:
        self.slope = self.before or 0.0

    def add(self, count: int, seconds: float, idle: int = 0) -> None:
        """One more point, after so many steps without any."""
        if self.n >= FEW:
            seconds = min(seconds, 2 * self.at(count))  # more is something else that ran
        tells = self.n > 0 and abs(count - self.x / self.n) > 0.5
        decay = self.decay ** (idle + 1)
        self.n = decay * self.n + 1.0
        self.x = decay * self.x + count
        self.y = decay * self.y + seconds
        self.xx = decay * self.xx + count * count
        self.xy = decay * self.xy + count * seconds
        self.slope = self._fitted()
        if tells:
            self.before = self.slope

    def _fitted(self) -> float:
        mean, unit = self.y / self.n, self.y / self.x
        spread, weight = max(0.0, self.xx - self.x * self.x / self.n), 0.05 * self.n
        before = unit / 2 if self.before is None else self.before
        slope = (self.xy - self.x * mean + weight * before) / (spread + weight)
        return min(unit, max(slope, LEAST * unit))

    def at(self, count: int) -> float:
        """Seconds of so many; 0 while nothing is known."""
        return self.y / self.n + self.slope * (count - self.x / self.n) if self.n else 0.0


@dataclass(slots=True)
class BatchCosts:
    """What steps of one batch size cost, in seconds, as averages over the steps seen so far."""

    batch: int
    rows: Line = field(default_factory=lambda: Line(before=0.0))
    plain: Average = field(default_factory=Average)  # a step without drafts
    free_rows: int = 1  # rows of a request that a step without drafts has anyway
    padded: bool = False  # is every request given the rows of the longest draft?
    emitted: Average = field(default_factory=lambda: Average(memory=20))
    seconds: Average = field(default_factory=lambda: Average(memory=20))
    was_plain: bool = True  # the step before
    met_drafts: bool = False
    steps: int = 0

    def add(self, times: StepTimes) -> None:
        self.steps += 1
        if not times.drafted:
            self.free_rows = times.rows // times.batch
            if self.was_plain:
                self._add_plain(times.total - times.drafting)
        self.was_plain = not times.drafted
        self.padded |= times.rows > times.drafted + times.batch
        if self.met_drafts or not times.drafted:  # the first pass with drafts touches memory that is new
            self.rows.add(times.rows, times.total - times.drafting)
        self.met_drafts |= times.drafted > 0
        self.emitted.add(times.emitted)
        self.seconds.add_cost(times.total)

    def _add_plain(self, seconds: float) -> None:
        """The first steps of all warm caches up: a much faster one soon after makes them forgotten."""
        if self.plain.count < 6 and seconds < 0.8 * self.plain.value:
            self.plain = Average()
        self.plain.add_cost(seconds)

    def plain_is_due(self, every: int) -> bool:
        """Whether the next step should be plain, because the price of plain decoding is not known or old.

        The more drafts gain, the less it matters and the more it costs.
        """
        if self.plain.count < 2:
            return True
        wanted = max(1, int(self.rate / self.plain_rate)) * every
        period = wanted if self.steps >= wanted else 1 << (max(self.steps, PLAIN_FIRST).bit_length() - 1)
        return self.steps % period >= period - PLAIN_RUN

    @property
    def row(self) -> float:
        """Seconds that one more row costs."""
        return self.rows.slope

    @property
    def plain_rate(self) -> float:
        """Tokens per second of plain decoding."""
        return self.batch / self.plain.value if self.plain.value else 0.0

    @property
    def rate(self) -> float:
        """Tokens per second of the latest steps, drafted or not."""
        return self.emitted.value / self.seconds.value if self.seconds.value else 0.0

    def row_price(self, index: int, sharing: int) -> float:
        """Seconds that the rows of the draft token at this index add to a step, for each request that drafts it."""
        if index + 2 <= self.free_rows:
            return 0.0
        return self.row * self.batch / max(1, sharing) if self.padded else self.row


@dataclass(slots=True)
class Costs:
    """The costs of every batch size met so far, and how long this has been running."""

    by_batch: dict[int, BatchCosts] = field(default_factory=lambda: {1: BatchCosts(1)})
    batch: int = 1
    elapsed: float = 0.0
    plain_every: int = PLAIN_EVERY

    @property
    def now(self) -> BatchCosts:
        return self.by_batch[self.batch]

    @property
    def plain_is_due(self) -> bool:
        return self.now.plain_is_due(self.plain_every)

    def add(self, times: StepTimes) -> None:
        self.elapsed += times.total
        self.batch = times.batch
        if times.batch not in self.by_batch:
            near = min(self.by_batch, key=lambda size: abs(size - times.batch))
            self.by_batch[times.batch] = BatchCosts(times.batch, Line(before=self.by_batch[near].row))
        self.now.add(times)
