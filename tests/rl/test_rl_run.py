import json
import os
import re
import shlex
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from helpers.killed_runs import KILLS, run_whole_and_killed
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.cli.entry import app
from rorqual.data.tokenizer import load_tokenizer
from rorqual.errors import UserError
from rorqual.plan.ledger import read_accounts
from rorqual.plan.rehearsal import keep_rehearsal
from rorqual.recipe import RLRecipe, load_recipe, parse_recipe
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.rehearse import rehearse
from rorqual.rl.rl_run import predict_rl, rl
from rorqual.train.interrupts import Stopped

RECIPE = """
name = "run"
out = "{out}"
seed = 5
template = "plain"
steps = {steps}
save_every = 2
sample_every = 2
eval_every = 3
eval_problems = 4
[model]
path = "{model}"
[[environments]]
name = "chain_sum"
prompt = "{{expression}}"
config = {{min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 2}}
[reward]
accuracy = 1.0
format = 0.0
length = 1.0
[grpo]
group_size = 4
questions_per_step = 2
mini_batches = 2
max_tokens = 6
kl = 0.01
refresh_reference = 3
[optimizer]
lr = 0.01
"""


@pytest.fixture
def model_dir(dense, tokenizer, tmp_path):
    dense.head_weight.data[tokenizer.eos_token_id] *= 6  # answers of different lengths, so that groups have a signal
    save_model(dense, tmp_path / "start", tokenizer)
    return tmp_path / "start"


def recipe_file(folder, model_dir, steps=6):
    path = folder / "recipe.toml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(RECIPE.format(out=folder, model=model_dir, steps=steps))
    return path


def recipe(folder, model_dir, *overrides, steps=6):
    return load_recipe(recipe_file(folder, model_dir, steps), RLRecipe, list(overrides))


def final_weights(folder):
    return (folder / "run" / "model" / "model.safetensors").read_bytes()


def lines(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_rollouts_stop_at_every_end_token(tmp_path, model_dir):
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    checked = recipe(tmp_path, model_dir)
    environments = [open_environment(section) for section in checked.environments]
    trainer = GRPOTrainer(load_model(model_dir), load_tokenizer(model_dir), environments, checked)
    assert trainer.engine.end_tokens == (0, 7, 9)


def test_a_run_leaves_a_model_metrics_and_a_ledger(tmp_path, model_dir):
    own = {"temperature": 0.3, "eos_token_id": [7, 0]}
    (model_dir / "generation_config.json").write_text(json.dumps(own))
    run_dir = rl(recipe(tmp_path, model_dir))
    made = json.loads((run_dir / "model" / "generation_config.json").read_text())
    assert {key: made.get(key) for key in own} == own
    load_model(run_dir / "model")
    load_tokenizer(run_dir / "model")
    found = {line["step"]: line for line in lines(tmp_path)}
    assert sorted(found) == list(range(7))
    assert {step for step in found if "eval_chain_sum" in found[step]} == {0, 3, 6}
    assert {step for step in found if "sample" in found[step]} == {1, 3, 5}
    assert {"reward", "reward_length", "seconds", "tokens", "lr", "kl"} <= found[4].keys()
    ledger = json.loads((run_dir / "ledger.json").read_text())
    assert ledger["stages"].keys() == {"rollout", "train", "evaluate"}
    assert ledger["stages"]["train"]["flops"] > 0
    assert ledger["stages"]["rollout"]["tokens"] == found[6]["tokens"]
    assert ledger["stages"]["train"]["tokens"] > 0
    assert "pass@1" in (run_dir / "model" / "README.md").read_text()
    assert final_weights(tmp_path) != (model_dir / "model.safetensors").read_bytes()


def test_stopped_by_a_signal_and_resumed_it_ends_the_same(tmp_path, model_dir, monkeypatch):
    rl(recipe(tmp_path / "whole", model_dir))
    real = GRPOTrainer.step

    def step(self, progress=0.0):
        if self.steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, progress)

    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "step", step)
        with pytest.raises(Stopped, match=r"stopped by SIGTERM at step 4, saved"):
            rl(recipe(tmp_path / "cut", model_dir))
    assert not (tmp_path / "cut" / "run" / "model").exists()
    rl(recipe(tmp_path / "cut", model_dir), resume=True)
    assert final_weights(tmp_path / "whole") == final_weights(tmp_path / "cut")


def test_a_finished_run_resumes_to_itself(tmp_path, model_dir):
    rl(recipe(tmp_path, model_dir))
    before = final_weights(tmp_path)
    rl(recipe(tmp_path, model_dir), resume=True)
    assert final_weights(tmp_path) == before
    with pytest.raises(UserError, match="already holds a run"):
        rl(recipe(tmp_path, model_dir))


def test_metrics_stay_json_when_the_policy_runs_away(tmp_path, model_dir, monkeypatch):
    real, steps = GRPOTrainer.step, []

    def step(self, progress=0.0):
        steps.append(self.steps)
        metrics = real(self, progress)
        return replace(metrics, update=replace(metrics.update, kl=float("inf"), entropy=float("nan")))

    monkeypatch.setattr(GRPOTrainer, "step", step)
    run_dir = rl(recipe(tmp_path, model_dir, steps=2))
    found = [json.loads(line, parse_constant=pytest.fail) for line in (run_dir / "metrics.jsonl").open()]
    assert [(line["kl"], line["entropy"]) for line in found if line["step"]] == [("inf", "nan")] * 2


def test_a_skipped_update_pushes_no_good_checkpoint_out(tmp_path, model_dir, monkeypatch):
    real = GRPOTrainer.step

    def step(self, progress=0.0):
        metrics = real(self, progress)
        self.skipped_in_a_row = int(self.steps > 2)
        return metrics

    monkeypatch.setattr(GRPOTrainer, "step", step)
    run_dir = rl(recipe(tmp_path, model_dir, "save_every=1", "keep=1", steps=4))
    assert sorted(p.name for p in run_dir.glob("checkpoints/*")) == ["step-2", "step-4"]  # 4: the end


def test_by_the_clock(tmp_path, model_dir):
    clocked = recipe(tmp_path, model_dir, "eval_every=0").model_copy(update={"steps": None, "seconds": 1.5})
    start = time.monotonic()
    rl(clocked)
    assert 1.0 < time.monotonic() - start < 10.0
    assert lines(tmp_path)[-1]["seconds"] >= 1.5


def test_a_budget_that_the_first_evaluation_takes_is_refused(tmp_path, model_dir):
    clocked = recipe(tmp_path, model_dir).model_copy(update={"steps": None, "seconds": 1e-3})
    with pytest.raises(UserError, match=r"seconds = 0\.001: 0 have passed before the first step; raise seconds"):
        rl(clocked)


def test_bad_recipes(tmp_path, model_dir):
    random_start = {"name": "x", "model": {"config": {}}, "environments": [{"name": "chain_sum"}], "steps": 1}
    with pytest.raises(UserError, match=r"model.path is missing"):
        rl(parse_recipe(random_start, RLRecipe))
    with pytest.raises(UserError, match="not a dataset of reasoning-gym"):
        rl(recipe(tmp_path, model_dir, "environments=[{name='nothing'}]"))
    with pytest.raises(UserError, match="context holds 512"):
        rl(recipe(tmp_path, model_dir, f"environments=[{{name='chain_sum', prompt='{'x ' * 600}{{expression}}'}}]"))


def test_what_would_end_a_run_ends_it_before_it_starts(tmp_path, model_dir):
    path = tmp_path / "mine.jsonl"
    rows = [{"question": f"{n} and {n + 1}?", "answer": "1"} for n in range(60)]
    for more, override, message in (
        ([{"question": "and so on " * 100, "answer": "1"}], "eval_every=0", r"mine\.jsonl, line 61: the prompt has"),
        ([], "eval_problems=50", r"environment mine: 50 distinct dev problems .* only \d+ exist"),
        ([], "grpo.max_tokens=512", r"grpo\.max_tokens = 512 leaves no space"),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows + more))
        for resume in (False, True):
            with pytest.raises(UserError, match=message):
                rl(recipe(tmp_path, model_dir, f"environments=[{{name='mine', path='{path}'}}]", override), resume)


def test_the_prediction_counts_as_the_ledger_does(tmp_path, model_dir, monkeypatch):
    """With the lengths that come out: a rehearsal of all steps. Answers that the limit cuts are all as long."""
    monkeypatch.setenv("RORQUAL_CALIBRATION", str(tmp_path / "calibration.json"))
    given = recipe(tmp_path, model_dir, "grpo.max_tokens=1", "grpo.drop_zero_std_groups=false", "reward.length=0.0")
    before = predict_rl(given, load_model(model_dir).config, 4.0)
    assert before["calibration"].startswith("not calibrated")
    assert before["tokens"] > 6 * 2 * 4 * 1 + 3 * 4
    keep_rehearsal(given, rehearse(given, 6, say=lambda _: None))
    run_dir = rl(given)
    ledger = json.loads((run_dir / "ledger.json").read_text())
    predicted = ledger["predicted"]
    assert predicted == json.loads((run_dir / "plan.json").read_text())
    assert predicted["calibration"].startswith("rehearsed in 6 steps")
    assert predicted["tokens"] == pytest.approx(ledger["total"]["tokens"], rel=0.1)
    assert predicted["flops"] == pytest.approx(ledger["total"]["flops"], rel=0.1)
    (account,) = read_accounts(run_dir)
    assert (account.unit, account.predicted) == ("s a step", predicted["seconds_a_step"])
    assert account.measured == pytest.approx(ledger["measured"]["seconds_a_step"])


@pytest.mark.parametrize("kills", KILLS)
def test_kills_change_nothing(tmp_path, model_dir, kills):
    paths = [recipe_file(tmp_path / name, model_dir, steps=40) for name in ("whole", "killed")]
    run_whole_and_killed("rl", "rorqual.rl.rl_run", *paths, kills)
    assert final_weights(tmp_path / "whole") == final_weights(tmp_path / "killed")
    assert [line["step"] for line in lines(tmp_path / "killed")] == list(range(41))


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "recipes").glob("r1-zero*.toml")), ids=lambda path: path.name
)
def test_ready_made_recipes_fit_their_environments(path):
    checked = load_recipe(path, RLRecipe)
    for section in checked.environments:
        problem = open_environment(section).problems("train", 1)[0]
        assert problem.question.endswith("?")
        assert problem.metadata["expression"] in problem.question


@pytest.mark.parametrize("worse", [True, False])
def test_where_it_got_worse_the_start_is_released(tmp_path, model_dir, monkeypatch, worse):
    shares = iter([0.5, 0.9, 0.4 if worse else 0.6])
    monkeypatch.setattr(GRPOTrainer, "evaluate", lambda *_: {"eval_chain_sum": next(shares)})
    run_dir = rl(recipe(tmp_path, model_dir, "keep_start=true"))
    start = load_model(model_dir, torch.float32).state_dict()
    released = load_model(run_dir / "model", torch.float32).state_dict()
    same = all(torch.equal(tensor, start[name]) for name, tensor in released.items())
    assert same == worse
    assert ("the initial ones" in (run_dir / "model" / "README.md").read_text()) == worse


def test_the_card_of_a_run_without_evaluations_says_how_to_evaluate(tmp_path, model_dir):
    run_dir = rl(recipe(tmp_path, model_dir, "eval_every=0", steps=1))
    text = (run_dir / "model" / "README.md").read_text()
    accuracy = text.partition("## Accuracy\n")[2].partition("\n## ")[0]
    assert accuracy.startswith("Not measured during training (eval_every = 0). ")
    assert "\n\n" not in accuracy.strip()
    command = re.search(r"```\nrorqual (eval .*)\n```", accuracy)[1]
    assert "--template plain" in command
    done = CliRunner().invoke(app, [*shlex.split(command), "--problems", "2", "--samples", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["gains"].keys() == {"chain_sum"}


def test_keeping_the_start_needs_evaluations(tmp_path, model_dir):
    with pytest.raises(UserError, match=r"keep_start .*eval_every is 0"):
        recipe(tmp_path, model_dir, "keep_start=true", "eval_every=0")


def test_a_run_keeps_the_dtype_it_began_with(tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr("rorqual.train.run_folder.fastest_dtype", lambda device: torch.float32)
    rl(recipe(tmp_path, model_dir))
    before = final_weights(tmp_path)
    assert 'dtype = "float32"' in (tmp_path / "run" / "recipe.toml").read_text()
    monkeypatch.setattr("rorqual.train.run_folder.fastest_dtype", lambda device: torch.bfloat16)
    rl(recipe(tmp_path, model_dir), resume=True)  # auto is what the run began with
    assert final_weights(tmp_path) == before
    with pytest.raises(UserError, match=r"model\.dtype was \"float32\" and is \"bfloat16\" now"):
        rl(recipe(tmp_path, model_dir, "model.dtype=bfloat16"), resume=True)
