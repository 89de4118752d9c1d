"""`rorqual pretrain` with processes of its own."""

import json
import shutil
import subprocess
import sys

import pytest

from rorqual.checkpoint.huggingface import load_model
from rorqual.errors import UserError
from rorqual.recipe import ParallelSection, TrainSection
from rorqual.train.layout_plan import plan_layout
from rorqual.train.run_folder import to_toml
from rorqual.train.training_run import micro_batches

STAGES = {"pipeline": 2, "schedule": "1f1b"}


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(2, STAGES), pytest.param(4, STAGES | {"data": 2, "experts": 2}, marks=pytest.mark.slow)],
)
def test_one_command_starts_them_all(tmp_path, make_recipe, child_environment, processes, layout):
    recipe = make_recipe(train__steps=4, train__micro_batch=1, train__eval_every=2, train__ema=0.9, parallel=layout)
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe.model_dump()))
    command = [sys.executable, "-m", "rorqual", "pretrain", str(path)]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sent in a step" in done.stdout
    lines = [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["tokens"] == 4 * 4 * recipe.data.sequence_length
    found = json.loads((recipe.run_dir / "parallel.json").read_text())
    sent = found["bytes_a_step"]
    for name in ("hidden states, within a node", "gradients of hidden states, within a node"):
        assert sent[name]["counted"] == sent[name]["computed"]
    assert set(found["bubble"]) == {"measured", "simulated"}
    planned = plan_layout(recipe, load_model(recipe.run_dir / "model").config).sent
    assert {f"{what}, {link}": total for (what, link), (_, _, total) in planned.items()} == {
        name: row["computed"] for name, row in sent.items() if row["computed"]
    }
    assert load_model(recipe.run_dir / "model").config.num_hidden_layers == 2
    assert (recipe.run_dir / "checkpoints" / "step-4" / f"tensors-00001-of-0000{processes}.safetensors").exists()


@pytest.mark.parametrize(
    ("section", "layout", "said"),
    [
        ({"batch_size": 8, "batch_ramp": (2, 0.5)}, {"pipeline": 2}, "train.batch_ramp"),
        ({"batch_size": 8, "micro_batch": 3}, {"pipeline": 2, "data": 2}, "a multiple of 6"),
    ],
)
def test_pipelines_need_equal_micro_batches(section, layout, said):
    with pytest.raises(UserError, match=said):
        micro_batches(TrainSection(steps=1, **section), ParallelSection(**layout))


@pytest.mark.slow
def test_what_is_refused_is_not_tried_again(tmp_path, make_recipe, child_environment):
    """The restart would go on with the run that is there."""
    recipe = make_recipe(train__steps=2, parallel={"data": 2})
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe.model_dump()))
    command = [sys.executable, "-m", "rorqual", "pretrain", str(path)]
    for status in (0, 2):
        done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == status, done.stderr[-3000:]
    assert done.stderr.count("already holds a run; continue it with --resume") == 1


@pytest.mark.slow
def test_a_run_that_is_over_is_released_by_another_layout(tmp_path, make_recipe, child_environment):
    """Its last checkpoint was written, and its release was not."""
    outputs = []
    for layout, more in (({"data": 2}, []), (STAGES, ["--resume"])):
        recipe = make_recipe(train__steps=2, train__micro_batch=1, parallel=layout)
        path = tmp_path / "recipe.toml"
        path.write_text(to_toml(recipe.model_dump()))
        command = [sys.executable, "-m", "rorqual", "pretrain", str(path), *more]
        done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append((recipe.run_dir / "model").exists())
        if not more:
            shutil.rmtree(recipe.run_dir / "model")
    assert outputs == [True, True]
    assert "sent in a step" not in done.stdout
