"""Runs on a real Ray, whose workers are killed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from helpers.fake_ray import FakeRay
from rorqual.checkpoint.huggingface import save_model
from rorqual.recipe import RLRecipe, load_recipe
from rorqual.rl import ray_rollouts, rl_run
from rorqual.rl.ray_rollouts import RayCluster
from rorqual.rl.rl_run import rl

pytest.importorskip("ray", reason="rollouts on Ray need the extra `cluster`")
pytestmark = pytest.mark.slow  # Ray and its workers take seconds to start; test_ray_rollouts.py needs neither

RECIPE = """
name = "run"
out = "{out}"
seed = 5
template = "plain"
steps = {steps}
save_every = 3
[model]
path = "{model}"
dtype = "float32"
[[environments]]
name = "chain_sum"
prompt = "{{expression}}"
config = {{min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 2}}
[reward]
format = 0.0
length = 1.0
[grpo]
group_size = 4
questions_per_step = 4
max_tokens = 12
kl = 0.0
[rollouts]
workers = 2
staleness = 2
threads = 1
replay_routing = true
[optimizer]
lr = 1e-4
"""


@pytest.fixture
def model_dir(moe, tokenizer, tmp_path):
    moe.head_weight.data[tokenizer.eos_token_id] *= 4  # answers of different lengths, so that groups have a signal
    save_model(moe, tmp_path / "start", tokenizer)
    return tmp_path / "start"


def recipe_file(folder, model_dir, steps):
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE.format(out=folder, model=model_dir, steps=steps))
    return folder / "recipe.toml"


def lines(folder):
    """What metrics.jsonl has of each step, but for times and memory; and the notes."""
    path = folder / "run" / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    own = ("memory_gb", "rollout_tokens_per_second", "train_tokens_per_second")
    steps = [
        {name: v for name, v in line.items() if name not in own and not name.endswith("seconds")}
        for line in found
        if "note" not in line
    ]
    return steps, [line["note"] for line in found if "note" in line]


def final_weights(folder):
    return (folder / "run" / "model" / "model.safetensors").read_bytes()


def ray_processes(of):
    """Of Ray, started by the process `of`; alive."""
    found = []
    for process in of.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append((" ".join(process.cmdline()), process))
    return found


def kill_workers(folder, kills, number, stop):
    """Send a random rollout worker a signal after every step that is logged, so many times."""
    generator, seen = random.Random(0), 0
    while kills and not stop.is_set():
        workers = [p for name, p in ray_processes(psutil.Process()) if name.startswith("ray::RolloutWorker")]
        steps = len(lines(folder)[0])
        if steps > seen and workers:
            seen = steps
            time.sleep(generator.uniform(0.0, 0.2))
            with contextlib.suppress(psutil.NoSuchProcess):
                generator.choice(workers).send_signal(number)
                kills -= 1
        time.sleep(0.01)


@contextlib.contextmanager
def undisturbed(recipe, config, address):
    """A fleet in this process, in place of `ray_cluster`."""
    yield RayCluster(FakeRay(), torch.device("cpu"))


@pytest.mark.parametrize(("number", "kills"), [(signal.SIGKILL, 1), (signal.SIGKILL, 20), (signal.SIGSTOP, 1)])
def test_workers_that_are_killed_or_hang_change_nothing(tmp_path, model_dir, monkeypatch, number, kills):
    monkeypatch.setattr(ray_rollouts, "HANG_SECONDS", 30.0)
    steps = 3 * kills + 6  # the last rollouts are submitted early: a worker killed then is not missed
    with monkeypatch.context() as patch:
        patch.setattr(rl_run, "ray_cluster", undisturbed)
        rl(load_recipe(recipe_file(tmp_path / "whole", model_dir, steps), RLRecipe), ray="local")
    path, stop = recipe_file(tmp_path / "killed", model_dir, steps), threading.Event()
    killer = threading.Thread(target=kill_workers, args=(tmp_path / "killed", kills, number, stop))
    killer.start()
    try:
        rl(load_recipe(path, RLRecipe), ray="local")
    finally:
        stop.set()
        killer.join()
    (expected, _), (found, notes) = lines(tmp_path / "whole"), lines(tmp_path / "killed")
    assert found == expected
    assert [line["staleness"] for line in found] == [0, 1] + [2] * (steps - 2)
    assert sum(line["grad_norm"] > 0 for line in found) > steps // 2
    assert len(notes) > kills // 2  # a worker that owes nothing any more is not missed
    assert final_weights(tmp_path / "killed") == final_weights(tmp_path / "whole")
    assert not [name for name, _ in ray_processes(psutil.Process()) if "ray" in name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_resumes_and_leaves_no_process(tmp_path, model_dir, number):
    rl(load_recipe(recipe_file(tmp_path / "whole", model_dir, 9), RLRecipe), ray="local")
    path = recipe_file(tmp_path / "cut", model_dir, 9)
    command = [sys.executable, "-c", "from rorqual.cli.entry import main; main()", "rl", str(path), "--ray", "local"]
    started = subprocess.Popen(command, start_new_session=True)
    while len(lines(tmp_path / "cut")[0]) < 4:
        assert started.poll() is None
        time.sleep(0.01)
    inside = ray_processes(psutil.Process(started.pid))
    assert any("raylet" in name for name, _ in inside)
    if number == signal.SIGINT:  # Ctrl-C in a terminal reaches all of its processes
        os.killpg(started.pid, number)
    else:
        started.send_signal(number)
    assert started.wait(timeout=120) != 0
    # Without its driver Ray ends by itself; its agents look for it now and then.
    _, alive = psutil.wait_procs([process for _, process in inside], timeout=300)
    assert not alive
    subprocess.run([*command, "--resume"], check=True, timeout=300)
    assert lines(tmp_path / "cut")[0] == lines(tmp_path / "whole")[0]
    assert final_weights(tmp_path / "cut") == final_weights(tmp_path / "whole")
