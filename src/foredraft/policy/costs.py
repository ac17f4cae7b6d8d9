"""What steps cost, measured as they run: averages that forget, a line through passes, prices by batch size.

Knows seconds and counts; nothing of drafters or of how sure they are.
"""

from dataclasses import dataclass, field

from foredraft.policy.base import StepTimes

PLAIN_EVERY = 192  # steps; of so many a few are plain, so that the price of plain decoding stays known
PLAIN_FIRST = 64  # steps before it is measured again; each wait is twice the last
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
        self.add(min(value, 2 * self.value) if self.count >= 4 and self.value else value)


@dataclass(slots=True)
class RowCost:
    """A line fitted to the seconds of a pass over its rows: least squares, where older passes weigh less.

    While all passes are equally wide the slope stays what it was: forgetting it would make drafts look free again.
    """

    decay: float = 0.99
    n: float = 0.0  # passes, and sums over them: rows x, seconds y, and their products
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    fitted: float = 0.0  # the slope when rows last differed

    def add(self, rows: int, seconds: float) -> None:
        decay = self.decay
        self.n = decay * self.n + 1.0
        self.x = decay * self.x + rows
        self.y = decay * self.y + seconds
        self.xx = decay * self.xx + rows * rows
        self.xy = decay * self.xy + rows * seconds

    def slope(self, floor: float) -> float:
        """Seconds that one more row costs, at least `floor` times the average pass."""
        n, x, y = self.n, self.x, self.y
        if not n:
            return 0.0
        spread = self.xx - x * x / n
        if spread > max(0.5, 0.1 * n):
            self.fitted = (self.xy - x * y / n) / spread
        return max(self.fitted, floor * y / n)


@dataclass(slots=True)
class BatchCosts:
    """What steps of one batch size cost, in seconds, as averages over the steps seen so far."""

    batch: int
    rows: RowCost = field(default_factory=RowCost)
    plain: Average = field(default_factory=Average)  # a step without drafts
    free_rows: int = 1  # rows of a request that a step without drafts has anyway
    padded: bool = False  # is every request given the rows of the longest draft?
    emitted: Average = field(default_factory=lambda: Average(memory=20))
    seconds: Average = field(default_factory=lambda: Average(memory=20))
    row: float = 0.0  # seconds that one more row costs
    was_plain: bool = True  # the step before
    steps: int = 0

    def add(self, times: StepTimes) -> None:
        self.steps += 1
        if not times.drafted:
            self.free_rows = times.rows // times.batch
            if self.was_plain:
                self._add_plain(times.total - times.drafting)
        self.was_plain = not times.drafted
        self.padded |= times.rows > times.drafted + times.batch
        self.rows.add(times.rows, times.total - times.drafting)
        self.emitted.add(times.emitted)
        self.seconds.add_cost(times.total)
        self.row = self.rows.slope(0.002)

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
            self.by_batch[times.batch] = BatchCosts(times.batch, RowCost(fitted=self.by_batch[near].row))
        self.now.add(times)
