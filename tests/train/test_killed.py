"""SIGKILL at random moments, also while a checkpoint is being written: the run ends with the same weights."""

import json
import subprocess
import sys

from safetensors.torch import load_file

from rorqual.train.run import to_toml

# Forks a fresh training process for each kill, so that torch is imported once and twenty kills take seconds.
HARNESS = """
import os, random, signal, sys, time
from rorqual.recipe import load_recipe
import rorqual.train.pretrain, transformers, tokenizers

straight, killed = (load_recipe(path, "pretrain") for path in sys.argv[1:3])
checkpoints = killed.run_dir / "checkpoints"

def start(recipe):
    pid = os.fork()
    if pid == 0:
        rorqual.train.pretrain.pretrain(recipe, resume=True)
        os._exit(0)
    return pid

began = time.monotonic()
assert os.waitpid(start(straight), 0)[1] == 0
took = time.monotonic() - began

generator = random.Random(0)
while_writing = 0
for number in range(20):
    pid = start(killed)
    time.sleep(generator.uniform(0.0, took / 16))  # so that twenty starts do not get to the end
    if number % 2:
        while not list(checkpoints.glob(".writing-*")):
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run ended"
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the run ended before it was killed"
    while_writing += bool(list(checkpoints.glob(".writing-*")))
assert os.waitpid(start(killed), 0)[1] == 0
print(while_writing)
"""


def test_twenty_kills_change_nothing(tmp_path, make_recipe, child_environment):
    runs, paths = [], []
    for name in ("straight", "killed"):
        recipe = make_recipe(
            name, train__steps=100, train__save_every=2, train__eval_every=50, train__batch_ramp=[2, 0.5],
            train__micro_batch=2, train__ema=0.95, data__sequence_length=16,
        )  # fmt: skip
        runs.append(recipe.run_dir)
        paths.append(tmp_path / f"{name}.toml")
        paths[-1].write_text(to_toml(recipe.model_dump()))
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, *map(str, paths)],
        env=child_environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 5  # kills that left a half-written checkpoint
    for file in ("model/model.safetensors", "checkpoints/step-100/tensors.safetensors"):
        straight, killed = (load_file(run_dir / file) for run_dir in runs)
        assert straight.keys() == killed.keys()
        assert all(straight[name].equal(killed[name]) for name in straight)
    steps = [json.loads(line)["step"] for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 101))
