"""A rehearsal is the run's own first steps."""

import math
from pathlib import Path

import pytest

from rorqual.checkpoint.huggingface import save_model
from rorqual.errors import UserError
from rorqual.plan.rehearsal import RehearsedStep, RLRehearsal, fingerprint, keep_rehearsal, kept_rehearsal
from rorqual.recipe import RLRecipe, parse_recipe
from rorqual.report.run_record import read_run
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.rehearse import rehearse
from rorqual.rl.rl_run import rl


@pytest.fixture
def raw(dense, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("RORQUAL_CALIBRATION", str(tmp_path / "calibration.json"))
    monkeypatch.chdir(tmp_path)
    dense.head_weight.data[tokenizer.eos_token_id] *= 12  # answers of different lengths
    save_model(dense, tmp_path / "start", tokenizer)
    return {
        "name": "run", "model": {"path": str(tmp_path / "start")}, "template": "plain", "steps": 3, "eval_every": 1,
        "eval_problems": 2, "environments": [{"name": "chain_sum", "prompt": "{expression}"}],
        "reward": {"accuracy": 1.0, "format": 0.0, "length": 1.0},
        "grpo": {"group_size": 4, "questions_per_step": 2, "max_tokens": 24, "kl": 0.01},
        "optimizer": {"lr": 0.01},
    }  # fmt: skip


def test_figures_are_those_of_the_run(raw, tmp_path):
    recipe, said = parse_recipe(raw, RLRecipe), []
    before = set(tmp_path.rglob("*"))
    found = rehearse(recipe, 3, say=said.append)
    assert set(tmp_path.rglob("*")) == before  # nothing is left behind
    assert len(said) == len(found.steps) == 3
    run_dir = rl(recipe)
    lines = [line for line in read_run(run_dir).parts[0].lines if line["step"]]
    for step, line in zip(found.steps, lines, strict=True):
        assert (step.length, step.spread, step.truncated) == (
            line["length"], line["length_spread"], line["truncated"],
        )  # fmt: skip
        assert 0 < step.rollout + step.rewards + step.training <= step.seconds
    assert len({step.length for step in found.steps}) > 1


def test_one_that_is_stopped_leaves_nothing_behind(raw, tmp_path, monkeypatch):
    def step(self, progress=0.0):
        raise KeyboardInterrupt

    monkeypatch.setattr(GRPOTrainer, "step", step)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        rehearse(parse_recipe(raw, RLRecipe))
    assert set(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="--rehearse 0"):
        rehearse(parse_recipe(raw, RLRecipe), 0)


def test_it_is_kept_for_recipes_with_such_steps(raw):
    step = RehearsedStep(4.0, 0.5, 0.25, 300.0, 1.0, 0.1, 2.0, 3.2)
    found = RLRehearsal(5.0, (step, step))
    recipe = parse_recipe(raw, RLRecipe)
    keep_rehearsal(recipe, found)
    assert kept_rehearsal(recipe) == found
    same = {"name": "other", "steps": 500, "eval_every": 0, "model": raw["model"] | {"dtype": "float32"}}
    assert kept_rehearsal(parse_recipe(raw | same, RLRecipe)) == found
    for change in ({"grpo": raw["grpo"] | {"max_tokens": 7}}, {"template": "r1-zero"}):
        assert kept_rehearsal(parse_recipe(raw | change, RLRecipe)) is None
    print_before = fingerprint(recipe)
    weights = Path(raw["model"]["path"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert fingerprint(recipe) != print_before


def test_the_first_step_is_left_out():
    steps = [RehearsedStep(4.0, 0.5, 0.0, 1.0, 1.0, 0.0, 1.0, seconds) for seconds in (9.0, 2.0, 4.0)]
    found = RLRehearsal(5.0, tuple(steps))
    assert found.median("seconds") == 3.0
    # The sample's standard deviation of log 2 and log 4, and that of the mean of two.
    assert found.noise == pytest.approx(math.log(2) / math.sqrt(2) * math.sqrt(1.5))
