"""SIGKILL of one of several processes at random moments: the run ends with the same weights."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from rorqual.train.run_folder import to_toml


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 50])
def test_kills_change_nothing(tmp_path, make_recipe, kills):
    """Four processes under torchrun, of which one is killed at a random moment, again and again."""
    runs: list = []
    done = 0
    for name in ("straight", "killed"):
        recipe = make_recipe(
            name, train__steps=4 * kills + 20, train__save_every=2, train__eval_every=50, train__batch_size=4,
            train__ema=0.95, data__sequence_length=16,
            parallel={"data": 4, "experts": 2, "restarts": 10 * kills, "timeout": 120.0},
        )  # fmt: skip
        path = tmp_path / f"{name}.toml"
        path.write_text(to_toml(recipe.model_dump()))
        runs.append(recipe.run_dir)
        process = subprocess.Popen([sys.executable, "-m", "rorqual", "pretrain", str(path)], cwd=tmp_path)
        done = 0 if name == "straight" else kill(process, recipe.run_dir, kills)
        assert process.wait(3600) == 0
    assert done == kills
    for part_of in ("tensors-00000-of-00004", "tensors-00003-of-00004"):
        straight, killed = (
            load_file(r / "checkpoints" / f"step-{4 * kills + 20}" / f"{part_of}.safetensors") for r in runs
        )
        assert all(torch.equal(straight[name], t) for name, t in killed.items())
    steps = [json.loads(line)["step"] for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 4 * kills + 21))


def kill(process, run_dir, kills):
    """Half of the kills while a checkpoint is written; how many there were before the run ended."""
    generator, done = random.Random(0), 0
    steps = 4 * kills + 20
    while done < kills and process.poll() is None:
        # Not before it has got on since the last kill, so that the run comes to its end.
        target = done * (steps - 10) // kills
        while process.poll() is None and newest(run_dir) < target:
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 0.5))
        deadline = time.monotonic() + 5
        while done % 2 and time.monotonic() < deadline and not list((run_dir / "checkpoints").glob(".writing-*")):
            time.sleep(0.005)
        workers = [p for p in psutil.Process(process.pid).children(recursive=True) if is_worker(p)]
        if len(workers) == 4:
            os.kill(generator.choice(workers).pid, signal.SIGKILL)
            done += 1
    return done


def is_worker(process):
    try:
        return "RANK" in process.environ()
    except psutil.Error:
        return False


def newest(run_dir):
    found = [int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step-*")]
    return max(found, default=0)
