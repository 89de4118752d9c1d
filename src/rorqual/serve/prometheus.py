"""Metrics for Prometheus. Names follow vLLM's; older names are kept until release 0.3."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from rorqual.engine import Engine

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class TokenLatency:
    """A histogram of seconds between tokens; prometheus_client's takes ten times as long an observation, too long for
    one a token.
    """

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(BETWEEN) + 1), 0.0

    def observe(self, seconds: float, tokens: int = 1) -> None:
        """`tokens` tokens came at once, `seconds` after those before; each counts as its share of the time."""
        self._counts[bisect_left(BETWEEN, seconds / tokens)] += tokens
        self._sum += seconds

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        return HistogramMetricFamily(
            name,
            text,
            buckets=list(zip([*map(str, BETWEEN), "+Inf"], accumulate(self._counts), strict=True)),
            sum_value=self._sum,
        )


class Metrics(Collector):
    """Counted by the service, or read from the engine on a scrape."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self._engine = engine
        self.requests = Counter("rorqual_requests", "Requests answered", ["path", "status"], registry=self.registry)
        self.first = Histogram(
            "rorqual_time_to_first_token_seconds", "From a request's arrival to its first token",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.between = TokenLatency()
        self._whole = [
            Histogram(name, text, buckets=SECONDS, registry=self.registry)
            for name, text in (
                ("rorqual_e2e_request_latency_seconds", "From a request's arrival to its last token"),
                ("rorqual_request_seconds", _deprecated("rorqual_e2e_request_latency_seconds")),
            )
        ]
        self.registry.register(self)

    def observe_request(self, seconds: float) -> None:
        """From a request's arrival to its last token."""
        for histogram in self._whole:
            histogram.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """prometheus_client's collector interface."""
        name = "rorqual_inter_token_latency_seconds"
        yield self.between.family(name, "Between two tokens of an answer")
        yield self.between.family("rorqual_time_per_output_token_seconds", _deprecated(name))
        now = self._engine.status()
        for name, old, text, value in (
            ("num_seqs_running", "samples_running", "Sequences in the decode batch", now.running),
            ("num_seqs_waiting", "samples_waiting", "Sequences waiting or in prefill", now.waiting),
            ("kv_cache_blocks_used", "cache_blocks_held", "KV cache blocks in use by requests", now.blocks_used),
            ("kv_cache_blocks", "cache_blocks", "KV cache blocks", now.blocks),
        ):
            yield GaugeMetricFamily(f"rorqual_{name}", text, value)
            yield GaugeMetricFamily(f"rorqual_{old}", _deprecated(f"rorqual_{name}"), value)
        if now.expert_balance is not None:
            text = "Tokens at the process with the busiest experts over the mean, averaged over layers"
            yield GaugeMetricFamily("rorqual_expert_balance", text, now.expert_balance)
        counts = now.counters
        yield CounterMetricFamily("rorqual_prompt_tokens", "Prompt tokens prefilled", counts.prompt_tokens)
        for name, old, text, value in (
            ("prefix_cache_hits", "cached_tokens", "Prompt tokens found in the prefix cache", counts.cached_tokens),
            ("generation_tokens", "generated_tokens", "Tokens generated", counts.generated_tokens),
            ("spec_decode_num_draft_tokens", "drafted_tokens", "Draft tokens verified", counts.draft_tokens),
            ("spec_decode_num_accepted_tokens", "accepted_tokens", "Draft tokens accepted", counts.accepted_tokens),
            ("num_preemptions", "preemptions", "Sequences preempted", counts.preemptions),
        ):
            yield CounterMetricFamily(f"rorqual_{name}", text, value)
            yield CounterMetricFamily(f"rorqual_{old}", _deprecated(f"rorqual_{name}_total"), value)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _deprecated(name: str) -> str:
    return f"Deprecated: use {name}"
