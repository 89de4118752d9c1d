"""Figures for Prometheus."""

from bisect import bisect_left
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from rorqual.engine import Engine

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Between:
    """A histogram; the library's takes ten times as long for a number, and here is one for every token."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(BETWEEN) + 1), 0.0

    def observe(self, seconds: float, tokens: int = 1) -> None:
        """So many came together so long after those before: to each its share."""
        self._counts[bisect_left(BETWEEN, seconds / tokens)] += tokens
        self._sum += seconds

    def family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(
            "rorqual_time_per_output_token_seconds",
            "Between two tokens of an answer",
            buckets=list(zip([*map(str, BETWEEN), "+Inf"], accumulate(self._counts), strict=True)),
            sum_value=self._sum,
        )


class Metrics:
    """Counted by the service, or read from the engine when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self._engine = engine
        self.requests = Counter("rorqual_requests", "Requests answered", ["path", "status"], registry=self.registry)
        self.first = Histogram(
            "rorqual_time_to_first_token_seconds", "From a request's arrival to its first token",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.between = Between()
        self.whole = Histogram(
            "rorqual_request_seconds", "From a request's arrival to its last token",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.registry.register(self)

    def collect(self):  # type: ignore[no-untyped-def]
        """What is not the library's own, as prometheus_client wants it."""
        yield self.between.family()
        now = self._engine.status()
        yield GaugeMetricFamily("rorqual_samples_running", "Samples that get a token every step", now.running)
        yield GaugeMetricFamily("rorqual_samples_waiting", "Samples that wait for a place", now.waiting)
        yield GaugeMetricFamily("rorqual_cache_blocks_held", "Blocks of the cache that requests hold", now.blocks_used)
        yield GaugeMetricFamily("rorqual_cache_blocks", "Blocks of the cache", now.blocks)
        counts = now.counters
        yield CounterMetricFamily("rorqual_prompt_tokens", "Prompt tokens computed", counts.prompt_tokens)
        yield CounterMetricFamily("rorqual_cached_tokens", "Prompt tokens found in the cache", counts.cached_tokens)
        yield CounterMetricFamily("rorqual_generated_tokens", "Tokens made", counts.generated_tokens)
        yield CounterMetricFamily("rorqual_drafted_tokens", "Guesses at tokens that were checked", counts.draft_tokens)
        yield CounterMetricFamily("rorqual_accepted_tokens", "Guesses that were right", counts.accepted_tokens)
        yield CounterMetricFamily("rorqual_preemptions", "Samples that gave their blocks back", counts.preemptions)

    def text(self) -> bytes:
        return generate_latest(self.registry)
