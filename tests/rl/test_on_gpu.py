"""RL on a GPU, as far as a device that computes on the CPU shows it (helpers/simulated_gpu.py)."""

import pytest
import torch

from helpers import simulated_gpu
from helpers.processes import run
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.errors import UserError
from rorqual.recipe import RLRecipe, parse_recipe
from rorqual.rl.rl_run import rl


def run_of(_rank, simulated, raw):
    if simulated:
        simulated_gpu.install()
    rl(parse_recipe(raw, RLRecipe))


def recipe_of(folder, name, **changes):
    return {
        "name": name, "out": str(folder), "model": {"path": str(folder / "start")}, "template": "plain", "steps": 1,
        "environments": [{"name": "chain_sum"}], "eval_every": 1, "eval_problems": 2,
        "reward": {"language": 1.0, "length": 0.5}, "optimizer": {"lr": 1e-3},
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("grpo", "changes"),
    [
        ({"rollout_weights": "fp8", "mini_batches": 2}, {"balance": {"bias_speed": 0.01, "sequence_loss": 0.01}}),
        pytest.param({"kl": 0.0}, {"rollouts": {"replay_routing": True}}, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_that_of_the_cpu(tmp_path, moe, tokenizer, grpo, changes):
    """Rollouts, rewards, the reference model's log-probabilities, the update and an evaluation."""
    save_model(moe, tmp_path / "start", tokenizer)
    sizes = {"group_size": 4, "questions_per_step": 2, "max_tokens": 10}
    for name, simulated in (("here", False), ("there", True)):
        run(1, run_of, simulated, recipe_of(tmp_path, name, grpo=sizes | grpo, **changes))
    start, here, there = (load_model(tmp_path / name) for name in ("start", "here/model", "there/model"))
    moved = 0.0
    for (name, before), w, v in zip(start.named_parameters(), here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(v, w, rtol=0, atol=1e-4, msg=name)
        moved += float((w - before).detach().abs().sum())
    assert moved > 0


def on_ray(_rank, raw):
    simulated_gpu.install()
    with pytest.raises(UserError, match="workers sample on CPUs; add device=cpu"):
        rl(parse_recipe(raw | {"device": "cuda"}, RLRecipe), ray="local")
    return True


def test_workers_on_ray_are_on_cpus(tmp_path):
    assert run(1, on_ray, recipe_of(tmp_path, "ray")) == [True]
