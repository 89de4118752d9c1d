"""Answers of small models are timed; which times come out is the machine's affair."""

import pytest

from rorqual.engine import calibrate as module
from rorqual.engine.calibrate import WORKS, EngineProbe, calibrate_engine, models, work_counts


@pytest.mark.parametrize("fp8", [False, True])
def test_costs_come_from_real_answers(monkeypatch, fp8):
    works = ((1, 1, 16, 4), (2, 2, 8, 3), (4, 1, 32, 1), (2, 8, 8, 2), (1, 4, 24, 3), (1, 1, 8, 2))
    few = [m for i, m in enumerate(models()) if i in (0, 5, 6)]
    monkeypatch.setattr(module, "models", lambda: iter(few))
    monkeypatch.setattr(module, "WORKS", works)
    monkeypatch.setattr(module, "ROUNDS", 2)
    said = []
    costs = calibrate_engine(fp8=fp8, say=said.append)
    assert len(said) == 2
    assert "calibrated on" in costs.source
    assert all(costs.seconds(work_counts(config, *work)) > 0 for config in few for work in WORKS)


def test_the_engine_does_the_work_that_is_counted():
    """Steps and tokens, by the engine's own counters."""
    probe = EngineProbe(next(models()))
    for i in range(len(WORKS)):
        probe.engine.reset()
        steps, real = [], probe.engine.step
        probe.engine.step = lambda real=real, steps=steps: steps.append(1) or real()
        probe._generate(i)
        probe.engine.step = real
        counters = probe.engine.status().counters
        prompts, _, prompt, length = WORKS[i]
        assert len(steps) == probe.counts[i].steps == length
        assert counters.prompt_tokens == prompts * prompt
        assert probe.counts[i].logits == counters.generated_tokens * probe.engine.model.config.vocab_size


def test_models_differ_in_every_count():
    """Or a cost could not be told from another."""
    counts = [work_counts(config, *work) for config in models() for work in WORKS]
    for name in vars(counts[0]):
        values = [getattr(c, name) for c in counts]
        assert max(values) >= 5 * max(1, min(values)) or name == "rounded"
