"""The time of an RL run on this machine, with costs of one part alone, so that it can be worked out by hand."""

import math
from dataclasses import fields

import pytest
import torch

from helpers.small_configs import GROUPED
from rorqual.plan import rl_here
from rorqual.plan.cost import flops_per_token
from rorqual.plan.cpu_time import Costs, keep
from rorqual.plan.engine_time import EngineCosts, keep_engine_costs
from rorqual.plan.rehearsal import RehearsedStep, RLRehearsal
from rorqual.plan.rl_here import (
    RLCosts,
    attended,
    packed_tokens,
    plan_rl_here,
    sampling_seconds,
    step_parts,
    training_counts,
)
from rorqual.plan.rl_plan import Lengths
from rorqual.plan.rl_text import rl_time_text
from rorqual.recipe import LoRASection, RLRecipe, parse_recipe
from rorqual.rl.rollout_packing import pack_rollout


@pytest.fixture(autouse=True)
def _kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RORQUAL_CALIBRATION", str(tmp_path / "calibration.json"))


def recipe(steps=10, grpo=None, **fields):
    sizes = {"group_size": 4, "questions_per_step": 3, "max_tokens": 20, "kl": 0.0} | (grpo or {})
    raw = {"name": "x", "model": {"path": "nowhere", "dtype": "float32"}, "environments": [{"name": "chain_sum"}]}
    return parse_recipe(raw | {"grpo": sizes, "steps": steps} | fields, RLRecipe)


def engine(spread=0.0, **costs):
    names = [f.name for f in fields(EngineCosts) if f.name not in ("spread", "source")]
    return EngineCosts(**dict.fromkeys(names, 0.0) | costs, spread=spread, source="")


def training(spread=0.0, **costs):
    names = [f.name for f in fields(Costs) if f.name not in ("spread", "source")]
    return Costs(**dict.fromkeys(names, 0.0) | costs, spread=spread, source="")


FULL = Lengths(prompt=8, mean=20, limit=20)  # all answers are cut


def test_a_rollout_waits_for_places():
    steps = engine(steps=1.0)
    assert sampling_seconds(GROUPED, steps, 3, 12, 12, FULL) == (1, 20, 0)
    prefill, body, tail = sampling_seconds(GROUPED, steps, 3, 12, 4, FULL)  # in three turns
    assert (prefill, body + tail) == (1, pytest.approx(60))
    logits = engine(logits=1.0)  # whatever the batch, a number for each token of each answer, and of the prefill
    assert sum(sampling_seconds(GROUPED, logits, 3, 12, 4, FULL)) == pytest.approx(60 * 12 * (20 + 1))


def test_the_tail_is_when_less_than_half_are_open():
    _, body, tail = sampling_seconds(GROUPED, engine(steps=1.0), 3, 1000, 1000, Lengths(8, 100, 1000, 0.8))
    median = 100 * math.exp(-(0.8**2) / 2)
    assert body == pytest.approx(median, rel=0.15)
    assert 500 < body + tail <= 1000  # the longest of a thousand


@pytest.mark.parametrize("mean", [5, 20])
@pytest.mark.parametrize("skips", [True, False])
def test_blocks_are_those_of_the_packing(monkeypatch, skips, mean):
    monkeypatch.setattr(rl_here, "skips_hidden", lambda *_: skips)
    given = recipe(grpo={"micro_tokens": 128})
    tokens, block = packed_tokens(given, GROUPED, Lengths(8, mean, 20))
    batches = pack_rollout(
        [[1] * 8] * 3, [[1] * mean] * 12, [i // 4 for i in range(12)], 128,
        lambda length: flops_per_token(GROUPED, 0 if skips else 4 * length),
    )  # fmt: skip
    assert tokens == sum(b.tokens.numel() for b in batches)
    assert {m.shape[-1] for b in batches for m in b.mask} == {block}


def test_attention_is_counted_for_what_masks_show(monkeypatch):
    given, lengths = recipe(), Lengths(100, 200, 400)
    monkeypatch.setattr(rl_here, "skips_hidden", lambda *_: False)
    assert attended(given, GROUPED, lengths, 1700) == 2  # the causal half of the block, and the other
    monkeypatch.setattr(rl_here, "skips_hidden", lambda *_: True)
    seen = 100**2 / 2 + 8 * (200 * 100 + 200**2 / 2)  # the prompt, and each of eight answers to it and to itself
    assert attended(given, GROUPED, lengths, 1700) == pytest.approx((seen + 64 * 1700) / (1700**2 / 2))


def test_counts_of_training():
    given = recipe(grpo={"mini_batches": 3, "micro_tokens": 64})
    train, forward = training_counts(given, GROUPED, FULL)
    tokens, _ = packed_tokens(given, GROUPED, FULL)
    layer = 1024 + 2 * 512 + 1024 + 3 * 32 * 48
    assert train.products == pytest.approx(3 * 2 * (tokens * 2 * layer + 12 * 20 * 60 * 32))
    assert train.logits == 12 * 20 * 60
    assert train.layers == 2 * 3 * math.ceil(tokens / 3 / 64)
    assert train.parameters == 3 * (2 * 60 * 32 + 32 + 2 * (layer + 64))
    assert (forward.products, forward.parameters) == (pytest.approx(train.products / 3), 0)
    adapted, forward = training_counts(given.model_copy(update={"lora": LoRASection(rank=2)}), GROUPED, FULL)
    assert adapted.products == pytest.approx(train.products * 2 / 3)  # without gradients of the weights
    assert forward.products == pytest.approx(train.products / 3)
    # A: 2 rows of the input's width, B: 2 columns of the output's.
    widths = [32 + 32, 32 + 16, 32 + 16, 32 + 32, 32 + 48, 32 + 48, 48 + 32]
    assert adapted.parameters == 3 * 2 * 2 * sum(widths)
    whole, forward = training_counts(given.model_copy(update={"recompute": "full"}), GROUPED, FULL)
    assert whole.products == pytest.approx(train.products * 4 / 3)
    assert forward.products == pytest.approx(train.products / 3)


def test_other_passes_are_counted():
    costs = RLCosts(training(logits=3.0), engine(rounded=1.0), engine())
    numbers = 12 * 20 * 60

    def passes(**grpo):
        return step_parts(recipe(grpo=grpo), GROUPED, costs, FULL)

    assert passes().log_probabilities == 0
    assert passes(kl=0.1).log_probabilities == numbers
    assert passes(mini_batches=2).log_probabilities == 0  # those of the engine are the old ones
    rounded = passes(mini_batches=2, rollout_weights="fp8")
    assert rounded.log_probabilities == numbers
    assert rounded.weights == 32 + 2 * (1024 + 2 * 512 + 1024 + 3 * 32 * 48 + 64)


def test_a_length_that_is_unknown_makes_the_interval():
    keep(training(), torch.float32)
    keep_engine_costs(engine(steps=1.0), torch.float32)
    plan = plan_rl_here(recipe(), GROUPED, prompt=8)
    low, high = plan["seconds_a_step_interval"]
    assert plan["mean_length"] == 10
    assert 1 + 10 < plan["seconds_a_step"] <= 1 + 20  # the longest of twelve
    assert low < plan["seconds_a_step"] < high
    assert plan["seconds"] == 10 * plan["seconds_a_step"]
    assert plan["tokens_per_second"] == plan["tokens"] / plan["seconds"]
    assert "half of the most" in rl_time_text(plan, recipe())


def test_evaluations_are_part_of_the_run():
    keep(training(), torch.float32)
    keep_engine_costs(engine(steps=1.0), torch.float32)
    given = {"eval_every": 4, "eval_problems": 2}
    plain, evaluated = plan_rl_here(recipe(), GROUPED, 8), plan_rl_here(recipe(**given), GROUPED, 8)
    one = evaluated["evaluation_seconds"] / 4  # before the first step, after 4, 8 and 10
    assert 1 + 10 < one <= 1 + 20
    assert evaluated["seconds"] == plain["seconds"] + 4 * one
    timed = plan_rl_here(recipe(None, seconds=1000.0, **given), GROUPED, 8)
    assert timed["seconds"] == pytest.approx(1000, rel=0.1)
    assert timed["steps"] < 1000 / plain["seconds_a_step"]


STEP = RehearsedStep(
    length=10.0, spread=0.5, truncated=0.1, trained_tokens=200.0, rollout=6.0, rewards=1.0, training=12.0, seconds=20.0
)


def test_a_rehearsal_sets_the_parts():
    keep(training(logits=1.0), torch.float32)
    keep_engine_costs(engine(steps=1.0), torch.float32)
    given = recipe(grpo={"kl": 0.1}, eval_every=5, eval_problems=12)
    plan = plan_rl_here(given, GROUPED, 8, RLRehearsal(8, (STEP, STEP, STEP)))
    parts = plan["parts"]
    assert parts["rollout"] + parts["tail"] == pytest.approx(6)
    assert parts["log_probabilities"] == pytest.approx(3)  # a forward pass of four
    assert (parts["training"], parts["rewards"], parts["weights"]) == (pytest.approx(9), 1, pytest.approx(1))
    assert plan["seconds_a_step"] == pytest.approx(20)
    assert plan["evaluation_seconds"] == pytest.approx(3 * 6)  # as many answers as a rollout's
    assert plan["tokens"] == pytest.approx(10 * (12 * 10 + 200) + 3 * 12 * 10)
    low, high = plan["seconds_a_step_interval"]
    # Steps that were alike: the least spread, of the mean of two; and ten steps of drift.
    spread = math.hypot(0.05 * math.sqrt(1.5), 0.02 * math.sqrt(10))
    assert (low, high) == (pytest.approx(20 / math.exp(1.2816 * spread)), pytest.approx(20 * math.exp(1.2816 * spread)))
