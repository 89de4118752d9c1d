"""Figures for Prometheus."""

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from rorqual.serve.prometheus import BETWEEN, TokenLatency


def test_times_between_tokens_are_written_as_the_library_writes_its_own():
    ours, registry, theirs = TokenLatency(), CollectorRegistry(), CollectorRegistry()
    name, text = "rorqual_inter_token_latency_seconds", "Between two tokens of an answer"
    histogram = Histogram(name, text, buckets=BETWEEN, registry=theirs)
    for seconds in (0.0, 0.001, 0.0011, 0.03, 0.03, 1.0, 7.0):
        ours.observe(seconds)
        histogram.observe(seconds)
    ours.observe(0.75, 3)  # tokens that came together
    for _ in range(3):
        histogram.observe(0.25)

    class Ours:
        def collect(self):
            yield ours.family(name, text)

    registry.register(Ours())
    said, wanted = (
        [line for line in generate_latest(r).decode().splitlines() if "_created" not in line]
        for r in (registry, theirs)
    )
    assert said == wanted
    assert any(line.endswith('+Inf"} 10.0') for line in said)
