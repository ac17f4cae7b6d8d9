"""Prometheus metrics: vLLM's names where they exist (`vllm:` is `foredraft:`), ours beside them.

Owns what is counted and what it is called. A step costs some additions; samples are made of them when somebody scrapes.
Accepted tokens are counted after truncation, as SpecStats counts them.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from foredraft.server.service import Figures
from foredraft.stats import SpecStats

MODEL = "model_name"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
FINISHED = ("stop", "length", "abort", "error")

COUNTERS: dict[str, tuple[str, str]] = {  # name: what it is, and what its second label is
    "spec_decode_num_drafts": ("Passes that had a draft to check.", ""),
    "spec_decode_num_draft_tokens": ("Tokens drafted.", ""),
    "spec_decode_num_accepted_tokens": ("Drafted tokens that reached a user.", ""),
    "spec_decode_num_accepted_tokens_per_pos": ("The same, by position in the draft.", "position"),
    "spec_decode_num_draft_tokens_per_pos": ("Tokens drafted, by position in the draft.", "position"),
    "speculation_off": ("Text steps without a draft, by reason.", "reason"),
    "tokens_by_source": ("Tokens generated: a drafter's (accepted), or the target's own.", "source"),
    "prompt_tokens": ("Prompt tokens, those found in the prefix cache included.", ""),
    "generation_tokens": ("Tokens generated.", ""),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", ""),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", ""),
    "request_success": ("Texts that ended, by reason.", "finished_reason"),
    "requests_refused": ("Requests turned away: the queue was full.", ""),
}
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "e2e_request_latency_seconds": ("From arrival to the last token.", SECONDS),
    "request_queue_time_seconds": ("From arrival to the first step.", SECONDS),
    "time_to_first_token_seconds": ("From arrival to the first token.", SECONDS),
    "inter_token_latency_seconds": ("Between the steps of a text, for each token.", STEP_SECONDS),
    "request_time_per_output_token_seconds": ("Mean over a text after its first token.", STEP_SECONDS),
    "request_prompt_tokens": ("Prompt length.", TOKENS),
    "request_generation_tokens": ("Output length.", TOKENS),
    "draft_length_tokens": ("Tokens drafted in a text's step, 0 included.", LENGTHS),
}
GAUGES: dict[str, tuple[str, Callable[[Figures], float]]] = {
    "num_requests_running": ("Texts in the engine's batch.", lambda figures: figures.running),
    "num_requests_waiting": ("Texts that wait for a place in it.", lambda figures: figures.waiting),
    "kv_cache_usage_perc": ("Share of the cache in use; 1 is full.", lambda figures: figures.cache_usage),
}


class StepFigures(NamedTuple):
    """What one step did for one text. `off` says why nothing was drafted; it counts only where nothing was.

    A tuple, for one is made for each text and step.
    """

    tokens: int
    drafted: int
    accepted: int
    drafter: str
    off: str
    since_last: float | None  # seconds since the text's step before; None at its first


@dataclass(slots=True)
class Tally:
    """How many values lie between bounds, and their sum."""

    bounds: tuple[float, ...]
    counts: list[int]  # [i]: values up to bounds[i]; one more for those beyond
    total: float = 0.0

    @classmethod
    def between(cls, bounds: tuple[float, ...]) -> "Tally":
        return cls(bounds, [0] * (len(bounds) + 1))

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Prometheus' form: how many values lie under each bound."""
        under, shown = 0, []
        for bound, count in zip((*self.bounds, float("inf")), list(self.counts), strict=True):
            under += count
            shown.append((str(float(bound)).replace("inf", "+Inf"), float(under)))
        return shown


class ModelMetrics:
    """One model's numbers. `step` is called on the engine's thread for every text and step, all else on the loop's."""

    def __init__(self) -> None:
        self.histograms = {name: Tally.between(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self.figures: Callable[[], Figures] | None = None
        self._gaps = self.histograms["inter_token_latency_seconds"]
        self._drafted: Counter[int] = Counter()  # text steps by the length of their drafts
        self._accepted: Counter[int] = Counter()
        self._sources: Counter[str] = Counter(target=0)
        self._off: Counter[str] = Counter()
        self._ended: Counter[str] = Counter(dict.fromkeys(FINISHED, 0))
        self._sums: Counter[str] = Counter()  # those without a second label

    def watch(self, figures: Callable[[], Figures]) -> None:
        """Gauges are read when somebody scrapes."""
        self.figures = figures

    def forget(self) -> None:
        """A model is gone: its gauges too. Counters stay, as Prometheus wants them to."""
        self.figures = None

    def step(self, figures: StepFigures) -> None:
        self._drafted[figures.drafted] += 1
        self._accepted[figures.accepted] += 1
        self._sources["target"] += figures.tokens - figures.accepted
        if figures.accepted:
            self._sources[figures.drafter] += figures.accepted
        if not figures.drafted:
            self._off[figures.off] += 1
        if figures.since_last is not None:
            self._gaps.observe(figures.since_last / figures.tokens, figures.tokens)

    def finished(self, reason: str, stats: SpecStats, queued: float) -> None:
        self._ended[reason] += 1
        self._sums["prompt_tokens"] += stats.prompt_tokens
        self._sums["prefix_cache_queries"] += stats.prefix_queries
        self._sums["prefix_cache_hits"] += stats.prefix_tokens
        observed = {
            "request_queue_time_seconds": queued,
            "e2e_request_latency_seconds": stats.seconds_total,
            "request_prompt_tokens": stats.prompt_tokens,
            "request_generation_tokens": stats.output_tokens,
        }
        if stats.seconds_to_first_token:
            observed["time_to_first_token_seconds"] = stats.seconds_to_first_token
        if stats.output_tokens > 1:
            rest = stats.seconds_total - stats.seconds_to_first_token
            observed["request_time_per_output_token_seconds"] = rest / (stats.output_tokens - 1)
        for name, value in observed.items():
            self.histograms[name].observe(value)

    def tally(self, name: str) -> Tally:
        """One of HISTOGRAMS."""
        if name != "draft_length_tokens":
            return self.histograms[name]
        lengths = Tally.between(HISTOGRAMS[name][1])
        for length, times in self._drafted.copy().items():
            lengths.observe(length, times)
        return lengths

    def refused(self) -> None:
        self._sums["requests_refused"] += 1

    def counters(self) -> dict[str, dict[str, float]]:
        """Every counter by its second label; copies, since the engine goes on counting."""
        drafted, accepted, sources = self._drafted.copy(), self._accepted.copy(), self._sources.copy()
        sums = {
            "spec_decode_num_drafts": drafted.total() - drafted[0],
            "spec_decode_num_draft_tokens": sum(length * times for length, times in drafted.items()),
            "spec_decode_num_accepted_tokens": sum(length * times for length, times in accepted.items()),
            "generation_tokens": sources.total(),
        }
        return {
            **{name: {"": sums.get(name, self._sums[name])} for name, (_, label) in COUNTERS.items() if not label},
            "spec_decode_num_draft_tokens_per_pos": _by_position(drafted),
            "spec_decode_num_accepted_tokens_per_pos": _by_position(accepted),
            "speculation_off": dict(self._off),
            "tokens_by_source": dict(sources),
            "request_success": dict(self._ended),
        }


def _by_position(lengths: Counter[int]) -> dict[str, float]:
    """How many of these reach each position."""
    return {
        str(position): sum(times for length, times in lengths.items() if length > position)
        for position in range(max(lengths, default=0))
    }


@dataclass(slots=True, eq=False)
class Metrics:
    """Of a whole server; `of(uid)` gives a model's part, which outlives the model."""

    models: dict[str, ModelMetrics] = field(default_factory=dict)

    def of(self, uid: str) -> ModelMetrics:
        return self.models.setdefault(uid, ModelMetrics())

    def render(self) -> tuple[bytes, str]:
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterable[Metric]:
        models = self.models.copy()
        yield from _counters({uid: model.counters() for uid, model in models.items()})
        for name, (text, _) in HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"foredraft:{name}", text, labels=[MODEL])
            for uid, model in models.items():
                tally = model.tally(name)
                histogram.add_metric([uid], tally.buckets(), tally.total)
            yield histogram
        yield from _gauges({uid: model.figures() for uid, model in models.items() if model.figures is not None})


def _counters(models: dict[str, dict[str, dict[str, float]]]) -> Iterator[Metric]:
    for name, (text, second) in COUNTERS.items():
        counter = CounterMetricFamily(f"foredraft:{name}", text, labels=[MODEL, second] if second else [MODEL])
        for uid, counted in models.items():
            for label, value in counted[name].items():
                counter.add_metric([uid, label] if second else [uid], value)
        yield counter


def _gauges(models: dict[str, Figures]) -> Iterator[Metric]:
    for name, (text, read) in GAUGES.items():
        gauge = GaugeMetricFamily(f"foredraft:{name}", text, labels=[MODEL])
        for uid, figures in models.items():
            gauge.add_metric([uid], read(figures))
        yield gauge
