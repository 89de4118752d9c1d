"""Plans of evaluations and distillations."""

import pytest

from rorqual.errors import UserError
from rorqual.plan.chips import find_chip
from rorqual.plan.inference import Instance
from rorqual.plan.known_models import find_model
from rorqual.plan.published_runs import calibration
from rorqual.plan.sampling_plan import Sampling, plan_distillation, plan_sampling, trained_for
from rorqual.plan.training_plan import Question

MODEL, CHIP = find_model("qwen2.5-1.5b"), find_chip("h100")


def sampling(**more):
    return Sampling(MODEL, CHIP, **({"problems": 100, "samples": 4, "answer": 400.0, "limit": 400.0} | more))


def test_answers_of_one_length():
    """All end together: one prefill of each prompt, and 400 decode steps of 400 sequences whose context grows."""
    plan = plan_sampling(sampling(chips=1))
    engine = Instance(MODEL, CHIP, 1, utilisation=calibration("hopper").utilisation)
    decode = 400 * engine.decode_seconds(400, 500 + 200)
    assert plan.seconds.value == pytest.approx(400 * engine.prefill_seconds(500) + decode, rel=0.01)
    assert plan.tokens == 100 * 4 * 400
    assert plan.seconds.low < plan.seconds.value < plan.seconds.high
    assert sum(plan.parts.values()) == pytest.approx(plan.seconds.value)
    assert plan.memory["KV cache"] == pytest.approx(400 * 900 * 28672)


def test_two_chips_share_the_answers():
    one, two = (plan_sampling(sampling(chips=n, problems=20000)) for n in (1, 2))
    assert two.seconds.value == pytest.approx(one.seconds.value / 2, rel=0.05)
    assert two.chip_hours.value == pytest.approx(one.chip_hours.value, rel=0.05)


def test_a_model_that_needs_a_node_takes_one():
    plan = plan_sampling(Sampling(find_model("deepseek-r1"), find_chip("h200"), 10, 1, weights="fp8"))
    assert plan.chips == 8


def test_a_distillation_is_sampling_and_training():
    student = Question(MODEL, CHIP, 1.0, 1, 1024, name="student")
    plan = plan_distillation(sampling(chips=1), student, keep=2, correct=0.5, epochs=3)
    sampled = plan_sampling(sampling(chips=1))
    assert plan.tokens == 3 * 100 * 0.5 * 2 * (500 + 400)
    assert plan.parts["sampling"] == pytest.approx(sampled.seconds.value)
    assert sum(plan.parts.values()) == pytest.approx(plan.seconds.value)
    assert plan.seconds.value > sampled.seconds.value
    assert plan.kind == "distill"


def test_a_student_trained_by_the_clock():
    student = Question(MODEL, CHIP, 1.0, 1, 1024)
    plan = plan_distillation(sampling(chips=1), student, keep=2, correct=0.5, epochs=3)
    timed = trained_for(plan, 60.0)
    sampled = plan.parts["sampling"]
    assert timed.seconds.value == pytest.approx(sampled + 60) == pytest.approx(sum(timed.parts.values()))
    assert timed.tokens / plan.tokens == pytest.approx(60 / (plan.seconds.value - sampled))
    assert timed.seconds.low == pytest.approx(sampled * plan.seconds.low / plan.seconds.value + 60)
    assert "the student is trained for 60 s" in timed.assumptions


def test_too_large_is_said():
    with pytest.raises(UserError, match="does not fit on 1 × NVIDIA H100 SXM with an answer of 400 tokens"):
        plan_sampling(Sampling(find_model("deepseek-r1"), CHIP, 10, 1, 1, answer=40.0, limit=400.0))
