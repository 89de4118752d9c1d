"""RL on a GPU, as far as a device that computes on the CPU shows it (helpers/simulated_gpu.py)."""

import importlib
import os
import sys
import time
from contextlib import nullcontext

import pytest
import torch

from helpers import processes, simulated_gpu
from helpers.fake_ray import FakeRay, plain
from helpers.processes import run
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.errors import UserError
from rorqual.recipe import RLRecipe, parse_recipe
from rorqual.rl import ray_rollouts, rl_run
from rorqual.rl.ray_rollouts import RayCluster
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


def run_with_fleet(_rank, simulated, raw):
    """Its rollouts are those of workers in this process, on devices of their own."""
    device = simulated_gpu.install() if simulated else torch.device("cpu")
    ray = FakeRay(cpus=(4,), gpus=(4,))
    cluster = RayCluster(ray, device)
    rl_run.ray_cluster = lambda *_: nullcontext(cluster)
    start = ray_rollouts.RolloutWorker.__init__

    def noted(worker, settings):
        start(worker, settings)
        kinds.add(worker.engine.model.head_weight.device.type)

    kinds = set()
    ray_rollouts.RolloutWorker.__init__ = noted
    rl(parse_recipe(raw, RLRecipe), ray="local")
    return sorted(kinds), [needs["num_gpus"] for needs in ray.needs], all(map(plain, ray.crossed))


@pytest.mark.parametrize("fp8", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_workers_have_gpus_of_their_own(tmp_path, moe, tokenizer, fp8):
    """The run is that of workers and a trainer on CPUs, but for rounding."""
    moe.head_weight.data[tokenizer.eos_token_id] *= 4
    save_model(moe, tmp_path / "start", tokenizer)
    sizes = {"group_size": 4, "questions_per_step": 2, "max_tokens": 6} | ({"rollout_weights": "fp8"} if fp8 else {})
    rollouts = {"workers": 2, "staleness": 1, "threads": 1, "replay_routing": True}
    fields = {"grpo": sizes, "rollouts": rollouts, "steps": 2, "eval_every": 0}
    here = run(1, run_with_fleet, False, recipe_of(tmp_path, "here", **fields))
    fields["rollouts"] = rollouts | {"gpus": 0.5}
    there = run(1, run_with_fleet, True, recipe_of(tmp_path, "there", **fields))
    assert here == [(["cpu"], [0, 0], True)]
    assert there == [(["simulated"], [0.5, 0.5], True)]
    start, cpu, gpu = (load_model(tmp_path / name) for name in ("start", "here/model", "there/model"))
    moved = 0.0
    for (name, before), w, v in zip(start.named_parameters(), cpu.parameters(), gpu.parameters(), strict=True):
        torch.testing.assert_close(v, w, rtol=0, atol=1e-4, msg=name)
        moved += float((w - before).detach().abs().sum())
    assert moved > 0


def on_ray(_rank, raw):
    ray = importlib.import_module("ray")
    simulated_gpu.install()
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment = {"env_vars": paths, "worker_process_setup_hook": "helpers.simulated_gpu.install"}
    ray.init(
        num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20,
        runtime_env=environment,
    )  # fmt: skip
    try:
        with pytest.raises(UserError, match=r"rollouts.workers = 2, .*: 2 GPUs have room for 1 workers; lower"):
            rl(parse_recipe(raw | {"device": "cuda", "rollouts": {"workers": 2}}, RLRecipe), ray="auto")
        rl(parse_recipe(raw | {"device": "cuda", "rollouts": {"workers": 1, "threads": 1}}, RLRecipe), ray="auto")
        while ray.available_resources().get("GPU") != 2.0:  # Ray hears of the end of an actor a little later
            time.sleep(0.1)
        return True
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_on_a_ray_with_gpus(tmp_path, moe, tokenizer, monkeypatch):
    """Ray gives the trainer and the worker a GPU each, and has both back at the end."""
    pytest.importorskip("ray", reason="rollouts on Ray need the extra `cluster`")
    monkeypatch.setattr(processes, "LIMIT", 600)  # Ray takes its time on a busy machine
    save_model(moe, tmp_path / "start", tokenizer)
    sizes = {"group_size": 4, "questions_per_step": 2, "max_tokens": 10}
    assert run(1, on_ray, recipe_of(tmp_path, "ray", grpo=sizes, steps=2)) == [True]
    lines = (tmp_path / "ray" / "metrics.jsonl").read_text()
    assert '"staleness": 1' in lines
    assert "replaced" not in lines
