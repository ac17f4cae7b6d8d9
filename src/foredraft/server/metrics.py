"""Prometheus metrics: vLLM's names where they exist (`vllm:` is `foredraft:`), ours beside them.

Owns the registry. Knows service figures and plain numbers; accepted tokens are counted after truncation, as SpecStats
counts them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from foredraft.server.service import Figures
from foredraft.stats import SpecStats

MODEL = ("model_name",)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
FINISHED = ("stop", "length", "abort", "error")


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What one step did for one text. `off` says why nothing was drafted; empty where something was."""

    tokens: int
    drafted: int
    accepted: int
    drafter: str
    off: str
    since_last: float | None  # seconds since the text's step before; None at its first


@dataclass(slots=True)
class Metrics:
    """Of a whole server; `of(uid)` gives a model's part."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    counters: dict[str, Counter] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    gauges: dict[str, Gauge] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, text, labels in COUNTERS:
            self.counters[name] = Counter(f"foredraft:{name}", text, (*MODEL, *labels), registry=self.registry)
        for name, text, buckets in HISTOGRAMS:
            self.histograms[name] = Histogram(f"foredraft:{name}", text, MODEL, buckets=buckets, registry=self.registry)
        for name, text in GAUGES:
            self.gauges[name] = Gauge(f"foredraft:{name}", text, MODEL, registry=self.registry)

    def of(self, uid: str) -> "ModelMetrics":
        return ModelMetrics(uid, self)

    def render(self) -> tuple[bytes, str]:
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


COUNTERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("spec_decode_num_drafts", "Passes that had a draft to check.", ()),
    ("spec_decode_num_draft_tokens", "Tokens drafted.", ()),
    ("spec_decode_num_accepted_tokens", "Drafted tokens that reached a user.", ()),
    ("spec_decode_num_accepted_tokens_per_pos", "The same, by position in the draft.", ("position",)),
    ("spec_decode_num_draft_tokens_per_pos", "Tokens drafted, by position in the draft.", ("position",)),
    ("speculation_off", "Text steps without a draft, by reason.", ("reason",)),
    ("tokens_by_source", "Tokens generated: a drafter's (accepted), or the target's own.", ("source",)),
    ("prompt_tokens", "Prompt tokens, those found in the prefix cache included.", ()),
    ("generation_tokens", "Tokens generated.", ()),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", ()),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", ()),
    ("request_success", "Texts that ended, by reason.", ("finished_reason",)),
    ("requests_refused", "Requests turned away: the queue was full.", ()),
)
HISTOGRAMS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("e2e_request_latency_seconds", "From arrival to the last token.", SECONDS),
    ("request_queue_time_seconds", "From arrival to the first step.", SECONDS),
    ("time_to_first_token_seconds", "From arrival to the first token.", SECONDS),
    ("inter_token_latency_seconds", "Between the steps of a text, for each token.", STEP_SECONDS),
    ("request_time_per_output_token_seconds", "Mean over a text after its first token.", STEP_SECONDS),
    ("request_prompt_tokens", "Prompt length.", TOKENS),
    ("request_generation_tokens", "Output length.", TOKENS),
    ("draft_length_tokens", "Tokens drafted in a text's step, 0 included.", LENGTHS),
)
GAUGES: tuple[tuple[str, str], ...] = (
    ("num_requests_running", "Texts in the engine's batch."),
    ("num_requests_waiting", "Texts that wait for a place in it."),
    ("kv_cache_usage_perc", "Share of the cache in use; 1 is full."),
)


class ModelMetrics:
    """One model's metrics, labels bound once: `step` runs on the engine's thread for every text and step."""

    def __init__(self, uid: str, metrics: Metrics) -> None:
        self._uid = uid
        self._metrics = metrics
        self._labelled: dict[tuple[str, str], Counter] = {}
        self._histograms = {name: one.labels(uid) for name, one in metrics.histograms.items()}
        for name, _, labels in COUNTERS:
            if not labels:
                self._counter(name)
        for reason in FINISHED:
            self._counter("request_success", reason)

    def watch(self, figures: Callable[[], Figures]) -> None:
        """Gauges are read when somebody scrapes."""
        gauges = self._metrics.gauges
        gauges["num_requests_running"].labels(self._uid).set_function(lambda: figures().running)
        gauges["num_requests_waiting"].labels(self._uid).set_function(lambda: figures().waiting)
        gauges["kv_cache_usage_perc"].labels(self._uid).set_function(lambda: figures().cache_usage)

    def forget(self) -> None:
        """A model is gone: its gauges too. Counters stay, as Prometheus wants them to."""
        for gauge in self._metrics.gauges.values():
            gauge.remove(self._uid)

    def step(self, figures: StepFigures) -> None:
        self._histograms["draft_length_tokens"].observe(figures.drafted)
        self._counter("generation_tokens").inc(figures.tokens)
        own = figures.tokens - figures.accepted
        if own:
            self._counter("tokens_by_source", "target").inc(own)
        if figures.accepted:
            self._counter("tokens_by_source", figures.drafter).inc(figures.accepted)
        if figures.drafted:
            self._drafted(figures)
        elif figures.off:
            self._counter("speculation_off", figures.off).inc()
        if figures.since_last is not None and figures.tokens:
            for _ in range(figures.tokens):
                self._histograms["inter_token_latency_seconds"].observe(figures.since_last / figures.tokens)

    def _drafted(self, figures: StepFigures) -> None:
        self._counter("spec_decode_num_drafts").inc()
        self._counter("spec_decode_num_draft_tokens").inc(figures.drafted)
        for position in range(figures.drafted):
            self._counter("spec_decode_num_draft_tokens_per_pos", str(position)).inc()
        if figures.accepted:
            self._counter("spec_decode_num_accepted_tokens").inc(figures.accepted)
        for position in range(figures.accepted):
            self._counter("spec_decode_num_accepted_tokens_per_pos", str(position)).inc()

    def finished(self, reason: str, stats: SpecStats, queued: float) -> None:
        self._counter("request_success", reason).inc()
        self._counter("prompt_tokens").inc(stats.prompt_tokens)
        self._counter("prefix_cache_queries").inc(stats.prefix_queries)
        self._counter("prefix_cache_hits").inc(stats.prefix_tokens)
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
            self._histograms[name].observe(value)

    def refused(self) -> None:
        self._counter("requests_refused").inc()

    def _counter(self, name: str, label: str = "") -> Counter:
        found = self._labelled.get((name, label))
        if found is None:
            found = self._metrics.counters[name].labels(self._uid, *([label] if label else []))
            self._labelled[name, label] = found
        return found
