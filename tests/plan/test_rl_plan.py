"""Rollouts and steps of RL."""

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from rorqual.errors import UserError
from rorqual.plan.chips import find_chip
from rorqual.plan.inference import Instance
from rorqual.plan.known_models import find_model
from rorqual.plan.rl_plan import Tuning, plan_rl, rollout_seconds, survivors

QWEN = find_model("qwen2.5-7b")
ENGINE = Instance(QWEN, find_chip("h100"), 1)
TUNING = Tuning(QWEN, find_chip("h100"), 8, steps=100)


@pytest.mark.parametrize(("mean", "limit"), [(500, 8192), (4000, 8192), (100, 32768)])
def test_lengths_have_the_mean_that_was_asked_for(mean, limit):
    points = survivors(mean, limit, 0.8)
    assert [share for _, share in points] == sorted((share for _, share in points), reverse=True)
    area = sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairwise(points))
    assert area == pytest.approx(mean, rel=0.03)


def test_a_rollout_is_the_sum_of_its_steps():
    """Against one simulated step by step, with lengths drawn at random."""
    generator = random.Random(0)
    median = 535.0  # of lengths whose mean is 700 after the cut
    lengths = sorted(min(2048.0, median * math.exp(0.8 * generator.gauss(0, 1))) for _ in range(64))
    seconds, done = 64 * ENGINE.prefill_seconds(100), 0
    for t in range(math.ceil(lengths[-1])):
        while lengths[done] <= t:
            done += 1
        seconds += ENGINE.decode_seconds(64 - done, 100 + t)
    assert sum(rollout_seconds(ENGINE, 1, 64, 100, 700, 2048)) == pytest.approx(seconds, rel=0.1)


def test_more_chips_do_not_shorten_the_tail():
    """verl's rollouts of 8192 answers, up to 28 K tokens, 7B: 357, 151 and 178 s on 32, 64 and 128 H20."""
    engine = Instance(QWEN, find_chip("h20"), 1)
    body, tail = zip(*(rollout_seconds(engine, n, 8192, 500, 1500, 28672, 1.0) for n in (32, 64, 128)), strict=True)
    assert body[0] > 1.9 * body[1]
    assert tail[2] > 0.8 * tail[0]
    assert body[1] + tail[1] == pytest.approx(151, rel=0.25)
    assert body[2] + tail[2] == pytest.approx(178, rel=0.25)


def test_answers_wait_where_caches_are_full():
    small = replace(ENGINE, chip=ENGINE.chip.model_copy(update={"memory": 20e9}))
    assert sum(rollout_seconds(small, 1, 4096, 500, 1000, 2000)) > sum(
        rollout_seconds(ENGINE, 1, 4096, 500, 1000, 2000)
    )


def test_parts_add_up_and_longer_answers_cost_more():
    short, long = (plan_rl(replace(TUNING, mean=(m, m))) for m in (500.0, 2000.0))
    assert sum(short.parts.values()) == pytest.approx(short.seconds.value)
    assert long.seconds.value > 1.5 * short.seconds.value
    assert short.seconds.low < short.seconds.value < short.seconds.high
    grows = plan_rl(replace(TUNING, mean=(500.0, 2000.0)))
    assert short.seconds.value < grows.seconds.value < long.seconds.value


def test_training_is_four_or_five_passes():
    """Three of training, one for old log-probabilities, one for the reference."""
    both, neither = plan_rl(TUNING), plan_rl(replace(TUNING, old=False, reference=False))
    assert both.parts["log_probabilities"] == pytest.approx(2 / 3 * both.parts["training"])
    assert neither.parts["log_probabilities"] == 0


def test_stale_rollouts_wait_for_the_longer_half():
    plan = plan_rl(replace(TUNING, stale=True))
    assert plan.parts["idle"] > 0
    assert sum(plan.parts.values()) == pytest.approx(plan.seconds.value)


def test_a_mean_above_the_limit_is_refused():
    with pytest.raises(UserError, match="9000 tokens on average with at most 8192: give a mean within the limit"):
        plan_rl(replace(TUNING, mean=(100.0, 9000.0)))
