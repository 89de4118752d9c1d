"""SIGKILL at random moments, also while a checkpoint is being written: the run ends with the same weights."""

import json

import pytest
from safetensors.torch import load_file

from helpers.killed_runs import KILLS, run_whole_and_killed
from rorqual.train.run_folder import to_toml


@pytest.mark.parametrize("kills", KILLS)
def test_kills_change_nothing(tmp_path, make_recipe, kills):
    runs, paths = [], []
    for name in ("straight", "killed"):
        recipe = make_recipe(
            name, train__steps=100, train__save_every=2, train__eval_every=50, train__batch_ramp=[2, 0.5],
            train__micro_batch=2, train__ema=0.95, data__sequence_length=16,
        )  # fmt: skip
        runs.append(recipe.run_dir)
        paths.append(tmp_path / f"{name}.toml")
        paths[-1].write_text(to_toml(recipe.model_dump()))
    run_whole_and_killed("pretrain", "rorqual.train.training_run", *paths, kills)
    for file in ("model/model.safetensors", "checkpoints/step-100/tensors.safetensors"):
        straight, killed = (load_file(run_dir / file) for run_dir in runs)
        assert straight.keys() == killed.keys()
        assert all(straight[name].equal(killed[name]) for name in straight)
    steps = [json.loads(line)["step"] for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 101))
