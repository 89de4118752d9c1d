"""Every algorithm of a recipe on tiny models: what it sets, and a step of it."""

import copy
import dataclasses

import pytest
import torch

from rorqual.errors import UserError
from rorqual.recipe import RLRecipe, parse_recipe
from rorqual.rl.envs.environment import Environment, Problem
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.rewards import Rewards
from rorqual.rl.rl_run import on_ray
from rorqual.rl.rollout import Rollout, Shard, assemble
from rorqual.rl.rollout_logprobs import rollout_logprobs
from rorqual.rl.rollout_packing import pack_rollout
from rorqual.train.checkpoints import Checkpoints


class Sums(Environment):
    def candidate(self, seed, index):
        a, b = index * 7 % 50, (index + seed) % 40
        return Problem(f"{a}+{b}=", str(a + b), f"{a} {b}", "", self.family)

    def check(self, problem, answer):
        return float(answer == problem.answer)


def recipe(reward=None, rollouts=None, balance=None, precision=None, **grpo):
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
            "reward": reward or {"accuracy": 0.0, "format": 0.0, "verdict": 1.0},
            "optimizer": {"lr": 0.01, "weight_decay": 0.0},
            "balance": balance or {},
            "rollouts": rollouts or {},
            "grpo": sizes | grpo,
        },
        RLRecipe,
    )


def share_of_sevens(sample, correct):
    return sample.text.count("7") / sample.length


def trainer(model, tokenizer, verdict=share_of_sevens, **fields):
    return GRPOTrainer(model, tokenizer, [Sums("sums", 1.0)], recipe(**fields), verdict=verdict)


def weights(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# -- presets

FIELDS = ("ratio", "surrogate", "clip_low", "clip_high", "kl", "normalise_std", "average", "max_draws")


@pytest.mark.parametrize(
    ("algorithm", "expected", "length"),
    [
        ("grpo", ("token", "clipped", 0.2, 0.2, 0.001, True, "sequence", 1), 0.0),
        ("dr_grpo", ("token", "clipped", 0.2, 0.2, 0.0, False, "constant", 1), 0.0),
        ("dapo", ("token", "clipped", 0.2, 0.28, 0.0, True, "token", 10), 1.0),
        ("gspo", ("sequence", "clipped", 3e-4, 4e-4, 0.0, True, "sequence", 1), 0.0),
        ("cispo", ("token", "weighted", 1.0, 4.0, 0.0, True, "token", 1), 0.0),
    ],
)
def test_an_algorithm_sets_fields(algorithm, expected, length):
    checked = recipe(algorithm=algorithm, reward={"accuracy": 1.0})
    assert tuple(getattr(checked.grpo, name) for name in FIELDS) == expected
    assert checked.reward.length == length
    saved = checked.model_dump(exclude_none=True)
    assert parse_recipe(saved, RLRecipe) == checked  # the resolved recipe says all of it


def test_given_fields_come_first():
    checked = recipe(algorithm="dapo", clip_high=0.5, kl=0.1, max_draws=2, reward={"length": 0.0, "accuracy": 1.0})
    assert (checked.grpo.clip_high, checked.grpo.kl, checked.grpo.max_draws, checked.reward.length) == (0.5, 0.1, 2, 0)
    assert checked.grpo.average == "token"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"algorithm": "ppo"}, "grpo.algorithm = 'ppo': input should be 'grpo', 'dr_grpo', 'dapo', 'gspo', 'cispo' or"),
        ({"kl": 0.0, "kl_estimate": "unbiased"}, "kl_estimate = 'unbiased': with kl = 0 there is no KL term"),
        ({"algorithm": "gspo", "kl_estimate": "unbiased"}, "kl_estimate = 'unbiased': with kl = 0"),
        ({"off_policy_mask": 0.1}, "grpo.off_policy_mask = 0.1: with mini_batches = 1 and nothing rounded"),
        ({"correction": "none", "importance_cap": 3.0}, "grpo.importance_cap: with grpo.correction = 'none'"),
        ({"importance_cap": 3.0}, "grpo.importance_cap: nothing is rounded or stale"),
        ({"clip_low": 1.0}, "clip_low = 1: the clipped surrogate needs a lower bound"),
        ({"algorithm": "opd"}, "grpo.algorithm = 'opd' needs a teacher; set opd.teacher"),
        ({"rollout_weights": "int4", "precision": "fp8"}, "grpo.rollout_weights = 'int4' with precision: products of"),
        (
            {"rollout_weights": "int8", "rollouts": {"replay_routing": True}},
            "grpo.rollout_weights = 'int8' with rollouts.replay_routing: packed weights run without",
        ),
        ({"top_p": 0.0}, "grpo.top_p = 0.0: input should be greater than 0"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(UserError) as error:
        recipe(**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_draws_that_follow_each_other_are_not_for_a_fleet():
    with pytest.raises(UserError, match=r"grpo.max_draws = 10 with --ray: rollouts are sampled ahead"):
        on_ray(recipe(algorithm="dapo"))


# -- updates


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
@pytest.mark.parametrize("mini_batches", [1, 2])
def test_one_step(algorithm, mini_batches, dense, tokenizer):
    toy = trainer(dense, tokenizer, algorithm=algorithm, mini_batches=mini_batches)
    before = weights(dense)
    update = toy.step().update
    assert update.grad_norm > 0
    assert update.ratio_max >= update.ratio_mean > 0
    assert update.clip_fraction == pytest.approx(update.clip_fraction_low + update.clip_fraction_high)
    if mini_batches == 1:
        assert update.ratio_mean == pytest.approx(1.0, abs=1e-6)
        assert update.clip_fraction == 0
    assert not equal(before, weights(dense))


@pytest.mark.parametrize(
    "fields",
    [
        {"algorithm": "gspo", "mini_batches": 2},
        {"correction": "sequence-truncate", "rollout_weights": "fp8", "kl": 0.1, "kl_estimate": "unbiased"},
        {"correction": "sequence-mask", "rollout_weights": "fp8", "importance_cap": 1.01},
        {"off_policy_mask": 1e-4, "mini_batches": 2},
        {"algorithm": "cispo", "mini_batches": 2, "top_p": 0.9, "correction": "token-mask"},
    ],
)
def test_micro_batches_do_not_change_the_update(fields, dense, tokenizer):
    ends = []
    for micro_tokens in (64, 8192):
        toy = trainer(copy.deepcopy(dense), tokenizer, micro_tokens=micro_tokens, **fields)
        update = toy.step().update
        ends.append((update.grad_norm, update.importance_truncated, update.off_policy_masked, update.ratio_mean))
    for one, other in zip(*ends, strict=True):
        assert (one is None) == (other is None)
        assert one is None or one == pytest.approx(other, rel=2e-3)


def test_a_completion_is_whole_in_one_micro_batch():
    generator = torch.Generator().manual_seed(0)
    completions = [[1] * int(n) for n in torch.randint(1, 40, (24,), generator=generator)]
    batches = pack_rollout([[1, 2]] * 4, completions, [i // 6 for i in range(24)], 64, lambda _: 1.0)
    assert len(batches) > 3
    found = torch.cat([packed.sequence.unique() for packed in batches])
    assert sorted(found.tolist()) == list(range(24))
    some = pack_rollout([[1, 2]] * 4, completions, [None, *(i // 6 for i in range(1, 24))], 64, lambda _: 1.0)
    assert sorted(torch.cat([packed.sequence.unique() for packed in some]).tolist()) == list(range(1, 24))


def test_dynamic_sampling_draws_until_rewards_differ(dense, tokenizer):
    calls = []

    def rare(sample, correct):  # only one group in the first draw, and all of the second, have rewards that differ
        calls.append(sample)
        return float(len(calls) in (2, 18, 22, 26, 30))

    toy = trainer(dense, tokenizer, verdict=rare, max_draws=5)
    metrics = toy.step()
    assert metrics.rollout.draws == 2
    assert metrics.rollout.zero_std_groups == 3 / 8
    assert metrics.rollout.reward == 5 / 32  # of everything sampled
    assert metrics.tokens == sum(sample.length for sample in calls)
    assert len({sample.problem.question for sample in calls}) == 8  # a draw has problems of its own
    assert metrics.update.grad_norm > 0


def test_dynamic_sampling_stops_at_its_limit(dense, tokenizer):
    toy = trainer(dense, tokenizer, verdict=lambda sample, correct: 1.0, max_draws=3)
    before = weights(dense)
    metrics = toy.step()
    assert metrics.rollout.draws == 3
    assert metrics.update.grad_norm == 0
    assert equal(before, weights(dense))


def test_dynamic_sampling_of_a_first_draw_that_is_enough_changes_nothing(dense, tokenizer):
    def mixed(sample, correct):
        return float(sum(map(ord, sample.text)) % 7)

    one = trainer(copy.deepcopy(dense), tokenizer, verdict=mixed, max_draws=3).step()
    assert one.rollout.draws == 1
    plain = trainer(copy.deepcopy(dense), tokenizer, verdict=mixed).step()
    assert one.rollout.reward == plain.rollout.reward
    assert one.update.grad_norm == pytest.approx(plain.update.grad_norm)


def test_dynamic_sampling_resumes_bit_for_bit(dense, tokenizer, tmp_path):
    fields = {"algorithm": "dapo", "verdict": lambda sample, _: float("7" in sample.text), "top_k": 50}
    whole = trainer(copy.deepcopy(dense), tokenizer, **fields)
    expected = [whole.step(0.1).rollout.draws for _ in range(4)]
    assert max(expected) > 1
    first = trainer(copy.deepcopy(dense), tokenizer, **fields)
    assert [first.step(0.1).rollout.draws for _ in range(2)] == expected[:2]
    Checkpoints(tmp_path, keep=1).save(2, first.tensors(), first.state())
    _, tensors, state = Checkpoints(tmp_path, keep=1).load_latest()
    resumed = trainer(copy.deepcopy(dense), tokenizer, **fields)
    resumed.load(tensors, state)
    assert [resumed.step(0.1).rollout.draws for _ in range(2)] == expected[2:]
    assert equal(weights(whole.model), weights(resumed.model))


def with_truncated(rollout, which):
    samples = [dataclasses.replace(s, truncated=which(i)) for i, s in enumerate(rollout.samples)]
    return dataclasses.replace(rollout, samples=samples)


def rewarded(totals):
    totals = torch.tensor(totals)
    none = torch.zeros(len(totals), dtype=torch.bool)
    return Rewards({"verdict": totals}, totals, none, none)


def test_truncated_answers_teach_nothing(dense, tokenizer):
    toy = trainer(dense, tokenizer, mask_truncated=True, kl=0.1)
    rollout, before = with_truncated(toy.rollouts.next(0).rollout, lambda i: True), weights(dense)
    sums = toy.update(rollout, rewarded([0.0, 1.0, 0.0, 1.0] * 4), 1.0, 0.0, 0)
    assert (sums.tokens, sums.grad_norms) == (0, [])
    assert equal(before, weights(dense))


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_truncated_answers_leave_the_average(average, dense, tokenizer):
    """Every other answer is truncated, and has an advantage of 0: without it the same sum has a smaller divisor."""
    rewards, norms = rewarded([0.5, 0.0, 0.5, 1.0] * 4), []
    for masked in (True, False):
        toy = trainer(copy.deepcopy(dense), tokenizer, mask_truncated=masked, average=average, kl=0.0)
        rollout = with_truncated(toy.rollouts.next(0).rollout, lambda i: i % 2 == 0)
        sums = toy.update(rollout, rewards, 1.0, 0.0, 0)
        norms += sums.grad_norms
        assert sums.tokens == int(rollout.lengths[1::2].sum() if masked else rollout.lengths.sum())
    expected = 2.0 if average != "token" else rollout.tokens / int(rollout.lengths[1::2].sum())
    assert norms[0] == pytest.approx(expected * norms[1], rel=1e-3)


@pytest.mark.parametrize("correction", ["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"])
def test_corrections_of_fp8_rollouts(correction, dense, tokenizer):
    update = trainer(dense, tokenizer, rollout_weights="fp8", correction=correction).step().update
    assert update.mismatch_logprob > 0
    assert 0 <= update.importance_truncated < 1
    if correction == "none":
        assert update.importance_truncated == 0


def test_a_correction_can_be_had_where_nothing_rounds(dense, tokenizer):
    update = trainer(dense, tokenizer, correction="sequence-mask").step().update
    assert update.mismatch_logprob < 1e-4
    assert update.importance_truncated == 0


def test_off_policy_outputs_are_masked(dense, tokenizer):
    update = trainer(dense, tokenizer, mini_batches=4, off_policy_mask=1e-6).step().update
    assert 0.1 < update.off_policy_masked < 0.9
    assert trainer(dense, tokenizer, mini_batches=2, off_policy_mask=50.0).step().update.off_policy_masked == 0


# -- top-p, top-k and min-p

FILTERS = [{"top_p": 0.8}, {"top_k": 9, "temperature": 0.7}, {"min_p": 0.1}, {"top_p": 0.9, "top_k": 40, "min_p": 0.01}]


@pytest.mark.parametrize("fields", FILTERS)
@pytest.mark.parametrize("network", ["dense", "moe"])
def test_trained_log_probabilities_are_those_sampled_with(fields, network, tokenizer, request):
    toy = trainer(request.getfixturevalue(network), tokenizer, **fields)
    rollout = toy.rollouts.next(0).rollout
    assert [len(sets.lengths) for sets in rollout.allowed] == rollout.lengths.tolist()
    found = rollout_logprobs(toy.model, rollout, range(16), toy.section)
    for own, sampled in zip(found, rollout.logprobs, strict=True):
        assert own == pytest.approx(sampled, abs=1e-4)
    bare = dataclasses.replace(rollout, allowed=None)
    found = rollout_logprobs(toy.model, bare, [0], toy.section)[0]
    assert sum(found) < sum(rollout.logprobs[0]) - 0.1  # without the sets every token is less probable


@pytest.mark.parametrize("fields", [{}, {"kl": 0.1, "mini_batches": 2, "rollout_weights": "fp8"}])
def test_filtered_rollouts_train(fields, dense, tokenizer):
    toy = trainer(dense, tokenizer, top_p=0.7, **fields)
    updates = [toy.step().update for _ in range(2)]
    assert all(update.grad_norm > 0 for update in updates)
    assert updates[0].ratio_mean == pytest.approx(1.0, abs=0.3)
    if fields:
        assert updates[0].mismatch_kl < 0.05


def test_shards_carry_the_sets(dense, tokenizer):
    toy = trainer(dense, tokenizer, top_p=0.8)
    rollout = toy.rollouts.next(0).rollout
    engine, params = toy.engine, toy.rollouts._params(0)
    parts = []
    for k in range(2):
        seed = params.seed + (2 * k << 32)
        part = engine.generate(rollout.prompts[2 * k : 2 * k + 2], dataclasses.replace(params, seed=seed))
        parts.append(Shard(**Shard.of(part, 1.0, 0).tensors()))
    again = assemble(engine, rollout.problems, rollout.prompts, parts)
    assert again.completions == rollout.completions
    for a, b in zip(again.allowed, rollout.allowed, strict=True):
        assert torch.equal(a.words, b.words)
        assert torch.equal(a.lengths, b.lengths)


def test_parts_of_rollouts(dense, tokenizer):
    toy = trainer(dense, tokenizer, top_p=0.8)
    one, other = toy.rollouts.next(0).rollout, toy.rollouts.next(1).rollout
    whole = Rollout.joined([one, other])
    assert whole.tokens == one.tokens + other.tokens
    part = whole.of_groups([1, 6])
    assert part.completions == one.completions[4:8] + other.completions[8:12]
    assert part.prompts == [one.prompts[1], other.prompts[2]]
    assert len(part.allowed) == len(part.samples) == 8
    assert part.routing is None


# -- balance


@pytest.mark.parametrize(("speed", "moves"), [(0.0, False), (0.01, True)])
def test_the_balancing_bias_is_frozen_or_live(speed, moves, moe, tokenizer):
    balance = {"bias_speed": speed} if speed else {}  # frozen by default
    toy = trainer(moe, tokenizer, balance=balance)
    bias = moe.moe_layers()[0].gate.e_score_correction_bias
    before = bias.clone()
    metrics = toy.step()
    assert torch.equal(bias, before) != moves
    assert metrics.update.max_vio_per_layer[0] >= 0
    if moves:
        assert (bias - before).abs().max().item() == pytest.approx(speed)
