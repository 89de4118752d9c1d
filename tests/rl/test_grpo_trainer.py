import copy
import dataclasses

import pytest
import torch

from rorqual.engine import SamplingParams
from rorqual.errors import UserError
from rorqual.recipe import RLRecipe, parse_recipe
from rorqual.rl.envs.environment import Environment, Problem
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.rollout import sample_groups
from rorqual.train.checkpoints import Checkpoints


class Sums(Environment):
    """a+b for small numbers, without reasoning-gym."""

    def candidate(self, seed, index):
        a, b = index * 7 % 50, (index + seed) % 40
        return Problem(f"{a}+{b}=", str(a + b), f"{a} {b}", "", self.family)

    def check(self, problem, answer):
        return float(answer == problem.answer)


def recipe(reward=None, optimizer=None, precision=None, recompute="none", **grpo):
    sizes = {"group_size": 4, "questions_per_step": 4, "max_tokens": 12, "micro_tokens": 128}
    return parse_recipe(
        {
            "name": "toy",
            "model": {"path": "unused"},
            "environments": [{"name": "sums"}],
            "template": "plain",
            "steps": 100,
            "seed": 3,
            "precision": precision,
            "recompute": recompute,
            "reward": reward or {"accuracy": 0.0, "format": 0.0, "verdict": 1.0},
            "optimizer": {"lr": 0.01, "weight_decay": 0.0} | (optimizer or {}),
            "balance": {"bias_speed": 0.01, "sequence_loss": 0.01},
            "grpo": sizes | {"kl": 0.0} | grpo,
        },
        RLRecipe,
    )


def share_of_sevens(sample, correct):
    return sample.text.count("7") / sample.length


def trainer(model, tokenizer, **fields):
    environments = [Sums("sums", 2.0), Sums("more", 1.0)]
    return GRPOTrainer(model, tokenizer, environments, recipe(**fields), verdict=share_of_sevens)


def weights(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("grpo", [{}, {"average": "token", "normalise_std": False}])
def test_reward_rises(dense, tokenizer, grpo):
    toy = trainer(dense, tokenizer, questions_per_step=6, group_size=6, **grpo)
    rewards = [toy.step().rollout.reward for _ in range(25)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3


FULL = {"kl": 0.05, "mini_batches": 2, "refresh_reference": 2, "drop_zero_std_groups": True}


@pytest.mark.parametrize(
    ("network", "fields"),
    [
        ("dense", {}),
        ("moe", FULL | {"rollout_weights": "fp8"}),
        ("moe", {"rollout_weights": "int4"}),
        ("moe", {"optimizer": {"name": "muon"}}),
        ("dense", FULL),
    ],
)
def test_resuming_changes_no_bit(network, fields, tokenizer, tmp_path, request):
    start = request.getfixturevalue(network)
    whole = trainer(copy.deepcopy(start), tokenizer, **fields)
    expected = [whole.step(0.1) for _ in range(5)]
    first = trainer(copy.deepcopy(start), tokenizer, **fields)
    for _ in range(3):
        first.step(0.1)
    Checkpoints(tmp_path, keep=1).save(3, first.tensors(), first.state())
    _, tensors, state = Checkpoints(tmp_path, keep=1).load_latest()
    torch.manual_seed(99)  # what the global generators hold must not matter
    resumed = trainer(copy.deepcopy(start), tokenizer, **fields)
    resumed.load(tensors, state)
    for metrics in expected[3:]:
        again = resumed.step(0.1)
        assert again.rollout.reward == metrics.rollout.reward
        assert again.tokens == metrics.tokens
    assert equal(weights(whole.model), weights(resumed.model))
    assert not equal(weights(whole.model), weights(first.model))


def test_on_policy_and_one_mini_batch_of_sampled_logprobs_agree(dense, tokenizer):
    """Two mini-batches take π_old from the engine; at the first of them it is the policy itself."""
    one = trainer(copy.deepcopy(dense), tokenizer, mini_batches=2, clip_low=1e-3, clip_high=1e-3)
    metrics = one.step()
    assert metrics.update.clip_fraction < 0.5  # only the second mini-batch, after an update, is clipped
    two = trainer(copy.deepcopy(dense), tokenizer, mini_batches=1, clip_low=1e-3, clip_high=1e-3)
    assert two.step().update.clip_fraction == 0.0


def test_micro_batches_do_not_change_the_update(dense, tokenizer):
    ends = []
    for micro_tokens in (64, 8192):
        toy = trainer(copy.deepcopy(dense), tokenizer, micro_tokens=micro_tokens, kl=0.1)
        metrics = toy.step()
        ends.append((weights(toy.model), metrics.update.grad_norm, metrics.update.entropy))
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-3)
    assert ends[0][2] == pytest.approx(ends[1][2], rel=1e-4)


def test_kl_is_zero_at_the_reference_and_grows(dense, tokenizer):
    toy = trainer(dense, tokenizer, kl=0.01, refresh_reference=0)
    first, second = (toy.step().update.kl for _ in range(2))
    assert first == pytest.approx(0.0, abs=1e-5)
    assert second > 1e-4


@pytest.mark.parametrize("network", ["dense", "moe"])
def test_fp8_rounds_the_update_and_not_the_rollout(network, tokenizer, request):
    model = request.getfixturevalue(network)
    plain, rounded = trainer(copy.deepcopy(model), tokenizer), trainer(copy.deepcopy(model), tokenizer, precision="fp8")
    first, second = plain.step(), rounded.step()
    samples = dataclasses.replace(second.rollout, rollout_tokens_per_second=first.rollout.rollout_tokens_per_second)
    assert samples == first.rollout  # sampled from the weights as they are
    assert second.update.grad_norm != first.update.grad_norm
    assert second.update.grad_norm == pytest.approx(first.update.grad_norm, rel=0.2)


@pytest.mark.parametrize("network", ["dense", "moe"])
@pytest.mark.parametrize("mini_batches", [1, 2])
@pytest.mark.parametrize("weights", ["fp8", "int4"])
def test_rounded_rollouts_are_measured_and_corrected(network, mini_batches, weights, tokenizer, request):
    toy = trainer(request.getfixturevalue(network), tokenizer, rollout_weights=weights, mini_batches=mini_batches)
    for _ in range(2):
        update = toy.step().update
        assert 0 < update.mismatch_logprob < 0.2
        assert 0 < update.mismatch_kl < 0.02
        assert update.importance_truncated <= (0.05 if weights == "int4" else 0)
        assert (update.routers_differ is None) == (network == "dense")
    fresh = copy.deepcopy(toy.twin.model)
    toy.twin.refresh()
    tokens = torch.arange(9).view(1, 9)
    assert not torch.equal(fresh(tokens), toy.twin.model(tokens))  # rounded again before the next rollout


def test_the_log_probabilities_before_the_updates_are_those_of_the_policy(dense, tokenizer):
    toy = trainer(dense, tokenizer, rollout_weights="fp8", mini_batches=2, questions_per_step=3)
    params = SamplingParams(max_tokens=9, n=4, seed=1)
    exact = sample_groups(toy.engine, toy.rollouts.draw(toy.steps), "plain", params)  # by the policy itself
    found = toy.update.logprobs_before(exact, [0, 5, 11])
    for i, own in enumerate(found):
        assert own == (pytest.approx(exact.logprobs[i], abs=1e-4) if i in (0, 5, 11) else [])


def test_importance_weights_are_capped(dense, tokenizer):
    toy = trainer(copy.deepcopy(dense), tokenizer, rollout_weights="fp8", importance_cap=1e-3)
    metrics = toy.step()
    assert metrics.update.importance_truncated == 1.0
    free = trainer(copy.deepcopy(dense), tokenizer, rollout_weights="fp8").step()
    assert metrics.update.grad_norm == pytest.approx(1e-3 * free.update.grad_norm, rel=0.05)


def test_nothing_is_corrected_where_nothing_is_rounded(moe, tokenizer):
    update = trainer(moe, tokenizer).step().update
    assert update.mismatch_logprob is update.mismatch_kl is update.importance_truncated is update.routers_differ is None
    with pytest.raises(UserError, match=r"grpo.importance_cap: nothing is rounded or stale"):
        recipe(importance_cap=2.0)


@pytest.mark.parametrize("recompute", ["v3", "full"])
def test_recomputation_changes_no_bit_of_an_update(moe, tokenizer, recompute):
    results = []
    for how in ("none", recompute):
        toy = trainer(copy.deepcopy(moe), tokenizer, kl=0.1, precision="fp8", recompute=how)
        toy.step()
        results.append(weights(toy.model))
    assert equal(*results)


def test_the_reference_follows_every_n_steps(dense, tokenizer):
    toy = trainer(dense, tokenizer, kl=0.01, refresh_reference=2)
    toy.step()
    assert not equal(toy.reference.state_dict(), toy.model.state_dict())
    toy.step()
    assert equal(toy.reference.state_dict(), toy.model.state_dict())


def test_without_kl_there_is_no_reference(dense, tokenizer):
    toy = trainer(dense, tokenizer)
    assert toy.reference is None
    assert not any(name.startswith("reference") for name in toy.tensors())
    assert toy.step().update.kl is None


def test_groups_without_signal_update_nothing(dense, tokenizer):
    toy = GRPOTrainer(dense, tokenizer, [Sums("sums", 1.0)], recipe({"accuracy": 1.0, "format": 0.0}))
    before = weights(dense)
    metrics = toy.step()  # a random model never answers right
    assert metrics.rollout.zero_std_groups == 1.0
    assert metrics.rollout.pass_at_g == metrics.update.grad_norm == 0.0
    assert equal(before, weights(dense))


def test_the_engine_shares_the_weights(dense, tokenizer):
    toy = trainer(dense, tokenizer)
    assert toy.engine.model is dense


def test_bfloat16_trains(moe, tokenizer):
    raw = recipe(kl=0.01)
    raw.model.dtype = "bfloat16"
    toy = GRPOTrainer(moe, tokenizer, [Sums("sums", 1.0)], raw, verdict=share_of_sevens)
    before = weights(moe)
    metrics = [toy.step() for _ in range(2)][-1]
    assert metrics.update.grad_norm > 0
    assert moe.head_weight.dtype == torch.bfloat16
    assert not equal(before, weights(moe))


def test_metrics_and_sample(moe, tokenizer):
    toy = trainer(moe, tokenizer, kl=0.01)
    metrics = toy.step()
    expected = {
        "reward",
        "reward_verdict",
        "reward_accuracy",
        "length",
        "entropy",
        "kl",
        "clip_fraction",
        "zero_std_groups",
    }
    expected |= {"truncated", "grad_norm", "lr", "tokens", "rollout_tokens_per_second", "max_vio", "sample"}
    assert expected <= {name for name, value in metrics.to_dict().items() if value is not None}
    assert "=\n<think>" in metrics.sample
    assert toy.step().sample is None
    assert set(toy.evaluate(20)) == {"eval_sums", "eval_more"}


def test_warm_up(dense, tokenizer):
    toy = trainer(dense, tokenizer)
    toy.recipe.warmup_steps = 4
    assert [toy.step().lr for _ in range(5)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])


def test_decay(dense, tokenizer):
    toy = trainer(dense, tokenizer)
    toy.recipe.decay = 0.5
    assert [toy.step(progress).lr for progress in (0.0, 0.5, 0.75, 1.0)] == pytest.approx([0.01, 0.01, 0.005, 0.0])


def test_three_updates_that_are_not_finite_stop(dense, tokenizer):
    toy = trainer(dense, tokenizer, questions_per_step=6, group_size=6)  # enough that no step is without signal
    toy.step()
    before = weights(dense)
    handle = dense.model.norm.register_full_backward_hook(lambda module, grads, _: (grads[0] * float("nan"),))
    assert toy.step().update.grad_norm != toy.step().update.grad_norm  # NaN
    with pytest.raises(UserError, match=r"optimizer.lr = 0.01: three updates in a row"):
        toy.step()
    handle.remove()
    assert equal(before, weights(dense))


def test_two_environments_of_one_name(dense, tokenizer):
    with pytest.raises(UserError, match="names must differ"):
        GRPOTrainer(dense, tokenizer, [Sums("sums", 1.0)] * 2, recipe())
