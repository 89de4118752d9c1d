"""RL with LoRA, and with the multi-token module trained along."""

import copy

import pytest
import torch

from helpers.documents import write_jsonl
from rorqual.adapters.lora import add_lora, lora_parameters, merge
from rorqual.adapters.peft_files import read_adapter
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.recipe import RLRecipe, parse_recipe
from rorqual.rl.envs.environment import Environment, Problem
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.mtp_update import MTPUpdate, predictions
from rorqual.rl.rl_run import rl
from rorqual.rl.rollout import sample_groups
from rorqual.rl.rollout_packing import pack_rollout
from rorqual.train.checkpoints import Checkpoints

LORA = {"rank": 4, "alpha": 8.0}


class Sums(Environment):
    def candidate(self, seed, index):
        a, b = index * 7 % 50, (index + seed) % 40
        return Problem(f"{a}+{b}=", str(a + b), f"{a} {b}", "", self.family)

    def check(self, problem, answer):
        return float(answer == problem.answer)


def recipe(lora=None, mtp=0.0, optimizer=None, **grpo):
    sizes = {"group_size": 4, "questions_per_step": 4, "max_tokens": 12, "micro_tokens": 128, "kl": 0.0}
    return parse_recipe(
        {
            "name": "toy", "model": {"path": "unused"}, "environments": [{"name": "sums"}], "template": "plain",
            "steps": 100, "seed": 3, "reward": {"accuracy": 0.0, "format": 0.0, "verdict": 1.0},
            "optimizer": {"lr": 0.01, "weight_decay": 0.0} | (optimizer or {}), "lora": lora, "mtp": {"weight": mtp},
            "grpo": sizes | grpo,
        },
        RLRecipe,
    )  # fmt: skip


def trainer(model, tokenizer, **fields):
    made = recipe(**fields)
    if made.lora is not None:
        add_lora(model, made.lora, made.seed)
    return GRPOTrainer(model, tokenizer, [Sums("sums", 1.0)], made, verdict=lambda s, _: s.text.count("7") / s.length)


def weights(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("network", ["dense", "moe"])
def test_rollouts_are_sampled_from_the_adapted_policy(network, tokenizer, request):
    model = request.getfixturevalue(network)
    toy = trainer(model, tokenizer, lora=LORA, kl=0.01)
    base = copy.deepcopy(model)
    rewards = [toy.step().rollout.reward for _ in range(4)]
    assert all(0 <= reward <= 1 for reward in rewards)
    params = SamplingParams(max_tokens=9, n=4, seed=1)
    sampled = sample_groups(toy.sampler, toy.rollouts.draw(toy.steps), "plain", params)
    found = toy.update.logprobs_before(sampled, list(range(16)))
    for own, expected in zip(found, sampled.logprobs, strict=True):
        assert own == pytest.approx(expected, abs=1e-4)
    for name, p in base.named_parameters():
        same = torch.equal(p, dict(model.named_parameters())[name])
        assert same == (name not in lora_parameters(model) or ".layers.2." in name), name  # layer 2 predicts ahead


def test_the_reference_takes_an_adapter_and_no_second_model(dense, tokenizer):
    toy = trainer(dense, tokenizer, lora=LORA, kl=0.05, refresh_reference=3)
    assert toy.step().update.kl == pytest.approx(0.0, abs=1e-6)
    assert toy.step().update.kl > 1e-5
    assert set(toy.reference.state_dict()) == set(lora_parameters(dense))
    toy.step()
    assert equal(toy.reference.state_dict(), lora_parameters(dense))


FULL = {"lora": LORA, "mtp": 0.3, "kl": 0.05, "mini_batches": 2, "refresh_reference": 2}


@pytest.mark.parametrize("fields", [FULL, FULL | {"rollout_weights": "fp8"}])
def test_resuming_changes_no_bit(moe, tokenizer, tmp_path, fields):
    whole = trainer(copy.deepcopy(moe), tokenizer, **fields)
    for _ in range(5):
        whole.step(0.1)
    first = trainer(copy.deepcopy(moe), tokenizer, **fields)
    for _ in range(3):
        first.step(0.1)
    Checkpoints(tmp_path, keep=1).save(3, first.tensors(), first.state())
    _, tensors, state = Checkpoints(tmp_path, keep=1).load_latest()
    assert not [name for name in tensors if name.endswith("_proj.weight")]  # of adapters alone
    resumed = trainer(copy.deepcopy(moe), tokenizer, **fields)
    resumed.load(tensors, state)
    for _ in range(2):
        resumed.step(0.1)
    assert equal(weights(whole.model), weights(resumed.model))
    assert not equal(weights(whole.model), weights(first.model))


def test_a_run_releases_the_merged_model_and_its_adapter(dense, tokenizer, tmp_path):
    start, problems = tmp_path / "start", tmp_path / "sums.jsonl"
    dense.head_weight.data[tokenizer.eos_token_id] *= 9  # answers of different lengths
    save_model(dense, start, tokenizer)
    rows = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]
    raw = {
        "name": "run", "out": str(tmp_path), "model": {"path": str(start)}, "template": "plain", "steps": 2,
        "environments": [{"name": "sums", "path": str(write_jsonl(problems, rows))}], "lora": LORA,
        "reward": {"accuracy": 0.0, "format": 0.0, "length": 1.0}, "optimizer": {"lr": 0.05},
        "grpo": {"group_size": 4, "questions_per_step": 4, "max_tokens": 16},
    }  # fmt: skip
    run_dir = rl(parse_recipe(raw, RLRecipe))
    merged = load_model(run_dir / "model")
    assert not lora_parameters(merged)
    again, adapter = load_model(start), read_adapter(run_dir / "adapter")
    assert adapter.base == str(start)
    merge(again, adapter.updates)
    assert equal(weights(again), weights(merged))
    assert not equal(weights(load_model(start)), weights(merged))
    with pytest.raises(UserError, match="lora with --ray"):
        rl(parse_recipe(raw, RLRecipe), ray="local")


# -- the multi-token module


def test_what_the_module_predicts_by_hand():
    # Prompt 9 8; completions a = 1 2 3 4 and b = 5 6. In the block: 9 8 1 2 3 5.
    (packed,) = pack_rollout([[9, 8]], [[1, 2, 3, 4], [5, 6]], [0, 0], 64, lambda length: 1.0)
    assert packed.tokens[0, :6].tolist() == [9, 8, 1, 2, 3, 5]
    rows, targets = predictions(packed, 1)  # at 1, given 2: 3; at 2, given 3: 4
    assert (rows.tolist(), targets.tolist()) == ([2, 3], [3, 4])
    rows, targets = predictions(packed, 2)
    assert (rows.tolist(), targets.tolist()) == ([2], [4])
    assert len(predictions(packed, 3)[0]) == 0


def test_its_loss_is_that_of_each_completion_alone(moe):
    """Packed with others, a completion's tokens are predicted as in a sequence of their own."""
    made = recipe(mtp=0.6, temperature=0.8)
    prompt, answers = [9, 8, 7], [[1, 2, 3, 4, 5], [6, 5, 4]]
    (packed,) = pack_rollout([prompt], answers, [0, 0], 64, lambda length: 1.0)
    update = MTPUpdate(moe, made)
    update.backward(moe(packed.tokens, packed.positions, packed.mask), packed, [packed])
    expected = 0.0
    with torch.no_grad():
        tokens = torch.tensor([prompt + answers[0]])  # the first, whose beginning the module sees after the prompt
        states = moe.mtp_hidden_states(moe(tokens), tokens)[0][0]
        logp = (states @ moe.head_weight.T / 0.8).log_softmax(-1)
        expected = -sum(float(logp[i, tokens[0, i + 2]]) for i in (3, 4, 5))
    update_alone = MTPUpdate(moe, made)
    (alone,) = pack_rollout([prompt], answers[:1], [0], 64, lambda length: 1.0)
    update_alone.backward(moe(alone.tokens, alone.positions, alone.mask), alone, [alone])
    assert update_alone.nats == pytest.approx(expected, rel=1e-4)
    assert (update_alone.predicted, update.predicted) == (3, 4)
    changed = {name for name, p in moe.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert changed
    assert all(".layers.2." in name for name in changed)


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_module_learns_and_the_policy_does_not_see_it(moe, tokenizer, lora):
    clip = {"clip": 1e6}  # the norm that gradients are clipped by counts the module's
    plain = trainer(copy.deepcopy(moe), tokenizer, lora=lora, optimizer=clip)
    along = trainer(copy.deepcopy(moe), tokenizer, lora=lora, optimizer=clip, mtp=0.5)
    for _ in range(8):
        assert plain.step().update.mtp_loss is None
        along.step()
    sampled = sample_groups(plain.engine, plain.rollouts.draw(9), "plain", SamplingParams(max_tokens=12, n=4, seed=5))
    (packed,) = pack_rollout(sampled.prompts, sampled.completions, [i // 4 for i in range(16)], 4096, lambda _: 1.0)
    losses = []
    for toy in (plain, along):
        update = MTPUpdate(toy.model, toy.recipe)
        update.backward(toy.model(packed.tokens, packed.positions, packed.mask), packed, [packed])
        losses.append(update.loss)
    assert losses[1] < losses[0] - (0.1 if lora is None else 0.01)
    mine, theirs = weights(along.model), weights(plain.model)
    assert equal(*({n: t for n, t in w.items() if ".layers.2." not in n} for w in (mine, theirs)))
    ahead = [n for n in mine if ".layers.2." in n and n.endswith("lora_B" if lora else "eh_proj.weight")]
    assert ahead
    assert not any(torch.equal(mine[n], theirs[n]) for n in ahead)
    assert along.flops["train"] > plain.flops["train"]


def test_a_module_is_needed(dense, tokenizer, tmp_path):
    save_model(dense, tmp_path / "start", tokenizer)
    raw = {
        "name": "run", "out": str(tmp_path), "model": {"path": str(tmp_path / "start")}, "steps": 1,
        "environments": [{"name": "chain_sum"}], "mtp": {"weight": 0.1},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"mtp.weight = 0.1: the model has no multi-token module"):
        rl(parse_recipe(raw, RLRecipe))


def test_speculation_goes_on_with_adapters(moe, tokenizer):
    """Drafts come from the adapted module, and change no token."""
    toy = trainer(moe, tokenizer, lora=LORA, mtp=0.5)
    for _ in range(2):
        toy.step()
    params = SamplingParams(max_tokens=24, seed=2, ignore_eos=True)
    plain = Engine(moe, tokenizer).generate(["1+2="], params)[0].tokens
    engine = Engine(moe, tokenizer, speculative="mtp")
    assert engine.generate(["1+2="], params)[0].tokens == plain
    assert engine.status().counters.draft_tokens > 0
