"""What steps cost, measured as they run: averages that forget, a line through passes, prices by batch size.

Knows seconds and counts; nothing of drafters or of how sure they are.
"""

from dataclasses import dataclass, field

from foredraft.policy.base import StepTimes

PLAIN_EVERY = 192  # steps; of so many a few are plain, so that the price of plain decoding stays known
PLAIN_FIRST = 64  # steps before it is measured again; each wait is twice the last
FEW = 4  # measurements; from then on one that is far too long is not believed
LOW = 3  # measurements in a row, each less than half of what is known, until that is forgotten: one may be chance
LEAST = 0.01  # of what a unit costs on average: what one more costs at least
PLAIN_RUN = 2  # of which the first is not counted: a drafter's weights have pushed the target's out of the caches
WARM = 7  # plain steps after a draft, until they take what they take without any: the second up to a third more
LONG_RUN = 10  # plain steps that tell how much more
CLOSE = 1.5  # times plain decoding: where drafting seems to gain no more it may gain nothing
FAR = 2.5  # times plain decoding: where it gains more, a long run would cost more than it tells
OLD = 16  # steps with drafts, after which what plain ones took before counts as few: the machine's speed changes
LONG_EVERY = 4  # of so many runs one is long, where that matters


@dataclass(slots=True)
class Average:
    """An exponential moving average that starts as the plain mean."""

    value: float = 0.0
    count: int = 0
    memory: int = 40

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, self.memory)

    def add_same(self, value: float, times: int) -> None:
        """`add`, so many times."""
        young = max(0, min(times, self.memory - self.count))  # of these it takes the plain mean
        share = self.count / (self.count + young) if young else 1.0
        share *= (1 - 1 / self.memory) ** (times - young)
        self.count += times
        self.value = value + (self.value - value) * share

    def add_all(self, mean: float, times: int) -> None:
        """So many values of this mean, at once."""
        self.count += times
        self.value += (mean - self.value) * min(1.0, times / min(self.count, self.memory))

    def add_cost(self, value: float) -> None:
        """Add a time; one that is far too long, because something else ran, counts as twice the average."""
        self.add(self.believed(value))

    def believed(self, value: float) -> float:
        return min(value, 2 * self.value) if self.count >= FEW and self.value else value


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
    low: int = 0  # the latest points in a row that took less than half of what is known

    def __post_init__(self) -> None:
        self.slope = self.before or 0.0

    def add(self, count: int, seconds: float, idle: int = 0, times: int = 1) -> None:
        """One more point, or the same so many times, after so many steps without any."""
        known = self.at(count)
        if self.n >= FEW:
            seconds = min(seconds, 2 * known)  # more is something else that ran
        self.low = self.low + 1 if known > 2 * seconds else 0
        if self.low >= (LOW if self.n >= FEW else 1):
            self._forget(2 * seconds / known)
        tells = self.n > 0 and abs(count - self.x / self.n) > 0.5
        decay, weight = self.decay ** (idle + times), 1.0
        if times > 1:
            weight = (1 - self.decay**times) / (1 - self.decay)  # each older one counts less
        self.n = decay * self.n + weight
        self.x = decay * self.x + weight * count
        self.y = decay * self.y + weight * seconds
        self.xx = decay * self.xx + weight * count * count
        self.xy = decay * self.xy + weight * count * seconds
        self.slope = self._fitted()
        if tells:
            self.before = self.slope

    def _forget(self, scale: float) -> None:
        """What is known was so many times too much: it is made less, and counts for two points."""
        share = min(1.0, 2 / self.n)
        self.n, self.x, self.xx = share * self.n, share * self.x, share * self.xx
        self.y, self.xy, self.slope = share * scale * self.y, share * scale * self.xy, scale * self.slope
        self.before = None if self.before is None else scale * self.before

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
    plain_rows: int = 0  # of the latest step without drafts
    second: float = 0.0  # seconds of the second step after the latest draft
    warmed: float = 0.0  # and of those that the caches were warm for again
    thawing: float = 0.0  # seconds that the steps of this run took longer than with warm caches
    after: Average = field(default_factory=lambda: Average(memory=8))  # the same, of whole runs
    thaw: Average = field(default_factory=lambda: Average(memory=LONG_EVERY))  # such a step over the second one
    gained: Average = field(default_factory=Average)  # tokens that steps with drafts made over what plain ones would
    drafted: int = 0  # steps with drafts since a plain one was measured
    met_drafts: bool = False
    low: int = 0  # the latest plain steps in a row that were much faster than what is known
    steps: int = 0

    def add(self, times: StepTimes, run: int, *, wide: bool) -> None:
        """A step, the latest of a `run` of so many without drafts.

        One that is not `wide` tells nothing of rows: what a pass takes longer behind any draft would be theirs.
        """
        self.steps += 1
        seconds: float | None = times.total - times.drafting
        if not times.drafted:
            self.free_rows, self.plain_rows = times.rows // times.batch, times.rows
            seconds = self._warm(times.total - times.drafting, run)
            if seconds is not None:
                self._add_plain(seconds)
        self.padded |= times.rows > times.drafted + times.batch
        first = times.drafted and not self.met_drafts  # it touches memory that is new
        if seconds is not None and wide and not first:
            self.rows.add(times.rows, seconds)
        self.met_drafts |= times.drafted > 0
        self.drafted += times.drafted > 0
        self.emitted.add(times.emitted)
        self.seconds.add_cost(times.total)

    def _warm(self, seconds: float, run: int) -> float | None:
        """What a plain step would take with the target's weights in the caches; None where it does not tell."""
        if run <= WARM:
            longer = max(0.0, self.plain.believed(seconds) - self.plain.value)
            self.thawing = longer + (self.thawing if run > 1 else 0.0)
            if run == WARM:
                self.after.add_cost(self.thawing)
        if run > WARM:
            self.warmed += seconds
            if run == LONG_RUN and self.second:
                self.thaw.add(min(1.0, self.warmed / (LONG_RUN - WARM) / self.second))
            return seconds
        if run != PLAIN_RUN:
            return None
        self.second, self.warmed = seconds, 0.0
        return seconds * (self.thaw.value or 1.0)

    def add_rest(self, steps: int, seconds: float) -> None:
        """So many steps without drafts after another one, which took so long on average."""
        self.steps += steps
        self.plain.add_all(seconds, steps)
        self.rows.add(self.plain_rows, seconds, times=steps)
        self.emitted.add_all(self.batch, steps)
        self.seconds.add_all(seconds, steps)

    def _add_plain(self, seconds: float) -> None:
        """Some that are much faster make those before forgotten: caches had to warm up, or something else ran."""
        if self.batch > 1 and self.drafted >= OLD:
            self.plain.count = min(self.plain.count, FEW)
        self.drafted = 0
        early = self.plain.count < 6
        self.low = self.low + 1 if seconds < (0.8 if early else 0.5) * self.plain.value else 0
        if self.low >= (1 if early else LOW):
            self.plain, self.low, self.gained = Average(), 0, Average()
        self.plain.add_cost(seconds)

    def plain_is_due(self, every: int) -> bool:
        """Whether the next step should be plain, because the price of plain decoding is not known or old.

        The more drafts gain, the less it matters and the more it costs. Right behind drafts plain steps take up to two
        thirds longer: unless a long run has told how much, drafting seems to gain what it does not.
        """
        if self.plain.count < 2:
            return True
        gains = self.rate / self.plain_rate
        wanted = max(1, int(gains)) * every
        if self.batch > 1 and gains < CLOSE:
            wanted = min(wanted, PLAIN_FIRST)
        period = wanted if self.steps >= wanted else 1 << (max(self.steps, PLAIN_FIRST).bit_length() - 1)
        runs, step = divmod(self.steps, period)
        doubtful = (gains < FAR and not self.thaw.count) or (gains < CLOSE and runs % LONG_EVERY == 0)
        return step >= period - (LONG_RUN if doubtful else PLAIN_RUN)

    @property
    def row(self) -> float:
        """Seconds that one more row costs."""
        return self.rows.slope

    @property
    def thaws(self) -> float:
        """Seconds that the plain steps after a draft take longer, all together; each at most twice what it should."""
        return min(self.after.value, WARM * self.plain.value)

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
    run: int = LONG_RUN  # steps since the latest draft
    rested: int = 0  # steps that are counted in `elapsed` only so far
    resting: float = 0.0  # seconds of these

    @property
    def now(self) -> BatchCosts:
        return self.by_batch[self.batch]

    @property
    def plain_is_due(self) -> bool:
        return self.now.plain_is_due(self.plain_every)

    def rest(self, batch: int, seconds: float) -> bool:
        """Take note of a step without drafts or prompts, in brief; False where that is not enough.

        It is known by `wake` what such steps take.
        """
        now = self.now
        if batch != self.batch or self.run <= LONG_RUN or now.plain.count < FEW:
            return False
        self.run += 1
        self.elapsed += seconds
        self.rested += 1
        self.resting += now.plain.believed(seconds)
        return True

    def wake(self) -> int:
        """Learn from the steps of a rest. Returns how many these were."""
        rested, seconds = self.rested, self.resting
        if rested:
            self.rested, self.resting = 0, 0.0
            self.now.add_rest(rested, seconds / rested)
        return rested

    def add(self, times: StepTimes, *, wide: bool = True) -> None:
        """A step; in one that is not `wide` a drafter was tried for some of those that it could draft for."""
        self.wake()
        self.elapsed += times.total
        self.batch = times.batch
        if times.batch not in self.by_batch:
            near = min(self.by_batch, key=lambda size: abs(size - times.batch))
            self.by_batch[times.batch] = BatchCosts(times.batch, Line(before=self.by_batch[near].row))
        self.run = 0 if times.drafted else self.run + 1
        self.now.add(times, self.run, wide=wide)
