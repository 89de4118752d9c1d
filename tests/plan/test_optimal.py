"""Models and tokens that a budget pays for."""

import pytest

from rorqual.errors import UserError
from rorqual.plan.chips import find_chip
from rorqual.plan.cost import flops_by_layer, parameters
from rorqual.plan.optimal import chips_within, largest_within, optimal_tokens, sized, tokens_within
from rorqual.plan.training_plan import Question, plan_training


def asked(**more):
    return Question(**({"config": sized("dense", 8), "chip": find_chip("h100"), "tokens": 1e9, "chips": 8} | more))


def test_the_law_is_deepseeks():
    config = sized("dense", 16)
    a_token = 3 * sum(f.forward for f in flops_by_layer(config, 4096))
    tokens = optimal_tokens(config, 4096)
    compute = a_token * tokens
    assert a_token == pytest.approx(0.1715 * compute**0.5243)
    assert tokens == pytest.approx(5.8316 * compute**0.4757, rel=0.01)


@pytest.mark.parametrize("shape", ["dense", "mixture"])
def test_families_grow(shape):
    counts = [parameters(sized(shape, heads)) for heads in (1, 2, 3, 5, 8, 16, 31, 64)]
    assert counts == sorted(counts)
    for total, active in counts:
        assert active <= total
    if shape == "mixture":
        # As DeepSeek-V2-Lite: 15.7 G, 2.4 G active, at 2048 wide; 27 layers there, 16 here.
        total, active = parameters(sized(shape, 16))
        assert 4 < total / active < 8


def test_more_money_buys_a_larger_model():
    plans = [largest_within(asked(), "dense", dollars) for dollars in (30, 300)]
    sizes = [parameters(plan.config)[0] for plan in plans]
    assert sizes[1] > 2 * sizes[0]
    for plan, dollars in zip(plans, (30, 300), strict=True):
        assert plan.cost.value == pytest.approx(dollars, rel=2e-3)
        assert plan.cost.value <= dollars
        # The next model of the family would not have been paid for.
        wider = sized("dense", plan.config.num_attention_heads + 1)
        question = asked(config=wider, tokens=optimal_tokens(wider, 4096))
        assert plan_training(question).cost.value > dollars


def test_days_and_money_both_hold():
    plan = tokens_within(asked(chips=None, days=2.0), 500.0)
    assert plan.cost.value <= 500
    assert plan.seconds.value <= 2 * 86400
    assert max(plan.cost.value / 500, plan.seconds.value / 2 / 86400) == pytest.approx(1, rel=2e-3)


def test_chips_are_as_many_as_spend_the_money_in_time():
    """$500 at $2.95 are 169 hours; in 2 days of 24 hours that is 3.5 chips."""
    assert chips_within(asked(chips=None, days=2.0), 500.0) == 4
    assert chips_within(asked(chips=None), 500.0) == 8
    assert chips_within(asked(chips=3), 500.0) == 3


def test_too_little_money_is_said():
    with pytest.raises(UserError, match=r"--budget 0\.0001 --days 1: too little for a model of 128 wide"):
        largest_within(asked(days=1.0), "dense", 1e-4)
