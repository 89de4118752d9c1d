"""Whole runs: what they leave behind, how they stop, how they go on."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rorqual import files
from rorqual.checkpoint.huggingface import load_model
from rorqual.errors import UserError
from rorqual.train import checkpoints as checkpoints_module
from rorqual.train import objective
from rorqual.train.interrupts import Stopped, StopSignals
from rorqual.train.objective import Objective
from rorqual.train.run_folder import to_toml
from rorqual.train.trainer import Trainer
from rorqual.train.training_run import TrainingRun, pretrain


def metrics_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights_of(run_dir):
    return load_file(run_dir / "model" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_a_model_metrics_and_a_ledger(make_recipe):
    recipe = make_recipe(train__steps=30, train__eval_every=10, train__save_every=10)
    run_dir = pretrain(recipe)
    lines = metrics_of(run_dir)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["valid_bpb"] < lines[9]["valid_bpb"]
    wanted = {"step", "seconds", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "utilisation", "memory_gb",
              "max_vio", "max_vio_per_layer", "valid_bpb", "mtp_loss"}  # fmt: skip
    assert wanted == set(lines[-1])
    assert tomllib.loads((run_dir / "recipe.toml").read_text())["train"]["steps"] == 30
    account = json.loads((run_dir / "ledger.json").read_text())
    assert account["total"]["tokens"] == account["predicted"]["tokens"] == 30 * 4 * 32
    assert account["total"]["flops"] == pytest.approx(account["predicted"]["flops"], rel=1e-6)
    card = (run_dir / "model" / "README.md").read_text()
    assert f"{lines[-1]['valid_bpb']:.4g} bits per byte" in card
    model = load_model(run_dir / "model")
    assert model.config.vocab_size == 300
    assert (run_dir / "model" / "tokenizer.json").exists()


def test_epochs_and_seconds_end_a_run(make_recipe):
    one = pretrain(make_recipe("epoch", train__steps=None, train__epochs=0.5, train__batch_size=32))
    rows = json.loads((one / "ledger.json").read_text())["predicted"]["tokens"] / 32 / 0.5
    assert metrics_of(one)[-1]["step"] == math.ceil(0.5 * rows / 32) > 1
    clock = pretrain(make_recipe("clock", train__steps=None, train__seconds=1.0, schedule={"name": "cosine"}))
    lines = metrics_of(clock)
    assert 1.0 <= lines[-1]["seconds"] < 3
    assert "valid_bpb" in lines[-1]
    assert lines[-1]["lr"] < 0.6 * max(line["lr"] for line in lines)  # the schedule followed the time


class Crash(BaseException):
    """Stands for SIGKILL within a process: nothing may catch it."""


def crash_at(monkeypatch, owner, name, calls, late=False):
    real, seen = getattr(owner, name), 0

    def crashing(*args, **kwargs):
        nonlocal seen
        seen += 1
        if seen == calls:
            if late:
                real(*args, **kwargs)
            monkeypatch.setattr(files, "discard", lambda folder: None)  # a killed process cleans nothing up
            raise Crash
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, crashing)


TO_RESUME = {"train__batch_ramp": [2, 0.6], "train__micro_batch": 2, "train__ema": 0.9, "train__keep": 1}


@pytest.fixture(scope="module")
def straight(make_recipe_of_module):
    """A run that nothing disturbs."""
    return pretrain(make_recipe_of_module("straight", **TO_RESUME))


@pytest.mark.parametrize(
    ("owner", "name", "calls", "late"),
    [
        (Trainer, "step", 3, True),  # before the first checkpoint
        (Trainer, "step", 7, False),
        (checkpoints_module, "save_file", 2, True),
        (files, "force_to_disk", 14, False),
        (os, "replace", 3, False),
        (TrainingRun, "_save", 3, True),  # after the last step, before the model is written
        ("rorqual.train.release", "save_model", 1, True),
    ],
)
def test_crash_and_resume_end_with_the_same_weights(make_recipe, straight, monkeypatch, owner, name, calls, late):
    if isinstance(owner, str):
        owner = sys.modules[owner]
    recipe = make_recipe("crashed", **TO_RESUME)
    with monkeypatch.context() as patch:
        crash_at(patch, owner, name, calls, late)
        with pytest.raises(Crash):
            pretrain(recipe)
    torch.manual_seed(99)
    crashed = pretrain(recipe, resume=True)
    assert same(weights_of(straight), weights_of(crashed))
    assert [line["step"] for line in metrics_of(crashed)] == list(range(1, 13))
    drop = ("seconds", "tokens_per_second", "utilisation", "memory_gb")
    a, b = ([{k: v for k, v in line.items() if k not in drop} for line in metrics_of(d)] for d in (straight, crashed))
    assert a == b


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_and_the_run_goes_on(make_recipe, monkeypatch, number):
    recipe = make_recipe(train__save_every=100)
    real = Trainer.step

    def step(self, *args):
        if self.steps == 4:
            os.kill(os.getpid(), number)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Stopped, match=f"{number.name} at step 5, saved; continue with --resume") as stopped:
            pretrain(recipe)
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert same(weights_of(pretrain(recipe, resume=True)), weights_of(pretrain(make_recipe("straight"))))


def test_a_second_signal_ends_at_once(capfd):
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert capfd.readouterr().err == "stopping after this step; again to stop at once\n"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_to_a_process(make_recipe, tmp_path, child_environment):
    recipe = make_recipe(train__steps=100000)
    (tmp_path / "recipe.toml").write_text(to_toml(recipe.model_dump()))
    program = (
        "import sys\nfrom rorqual.recipe import PretrainRecipe, load_recipe\n"
        "from rorqual.train import Stopped\nfrom rorqual.train.training_run import pretrain\n"
        "try:\n    pretrain(load_recipe(sys.argv[1], PretrainRecipe))\nexcept Stopped as e:\n    sys.exit(e.exit_code)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "recipe.toml")], env=child_environment)
    while process.poll() is None and not list(recipe.run_dir.glob("checkpoints/step-*")):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    state = json.loads(max(recipe.run_dir.glob("checkpoints/*/state.json"), key=os.path.getmtime).read_text())
    assert state["step"] == metrics_of(recipe.run_dir)[-1]["step"]


def spoil_losses(monkeypatch, factor, steps):
    """Multiply the losses of these steps, counted from 0."""
    real, cross_entropy, objectives = Objective.losses, objective.linear_cross_entropy, []

    def losses(self, *args):
        if self not in objectives:  # each step has one
            objectives.append(self)
        with monkeypatch.context() as patch:
            if len(objectives) - 1 in steps:
                patch.setattr(objective, "linear_cross_entropy", lambda *a: cross_entropy(*a) * factor)
            return real(self, *args)

    monkeypatch.setattr(Objective, "losses", losses)


def test_three_steps_that_are_not_finite_stop_the_run(make_recipe, monkeypatch, capsys):
    recipe = make_recipe(train__save_every=2)
    spoil_losses(monkeypatch, float("nan"), {2, 5, 6, 7})
    with pytest.raises(UserError, match=r"3 steps in a row .* at step 8 with the last good checkpoint kept; lower"):
        pretrain(recipe)
    lines = metrics_of(recipe.run_dir)
    assert [line["step"] for line in lines if line.get("loss") == "nan"] == [3, 6, 7, 8]
    notes = [line["note"] for line in lines if "note" in line]
    assert notes[0] == "step 3: the loss is not finite; step skipped (1 in a row)"
    assert notes[-1] == "step 8: the loss is not finite; step skipped (3 in a row)"
    assert notes[0] in capsys.readouterr().err
    newest = max(recipe.run_dir.glob("checkpoints/step-*"), key=os.path.getmtime)
    assert all(t.isfinite().all() for n, t in load_file(newest / "tensors.safetensors").items() if "rng" not in n)


def test_skipped_steps_push_no_good_checkpoint_out(make_recipe, monkeypatch):
    recipe = make_recipe(train__save_every=1, train__keep=1)
    spoil_losses(monkeypatch, float("inf"), range(5, 100))
    with pytest.raises(UserError, match="3 steps in a row"):
        pretrain(recipe)
    assert {p.name for p in recipe.run_dir.glob("checkpoints/*")} >= {"step-5"}
    assert not {p.name for p in recipe.run_dir.glob("checkpoints/*")} & {"step-6", "step-7", "step-8"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_validation_that_is_not_finite_is_never_best(make_recipe, monkeypatch, bad):
    real, steps = Trainer.bits_per_byte, []

    def bits_per_byte(self, batches):
        steps.append(self.steps)
        return bad if len(steps) in (1, 3) else real(self, batches)

    monkeypatch.setattr(Trainer, "bits_per_byte", bits_per_byte)
    run_dir = pretrain(make_recipe(train__keep=1))
    assert steps == [4, 8, 12]
    assert checkpoints_module.Checkpoints(run_dir, 1).best() == 8
    for file in (*run_dir.glob("checkpoints/*/state.json"), run_dir / "ledger.json"):
        json.loads(file.read_text(), parse_constant=pytest.fail)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (run_dir / "metrics.jsonl").open()]
    assert [line["valid_bpb"] for line in lines if line["step"] in (4, 12)] == [str(bad), str(bad)]
    assert f"| held-out text | {bad} bits per byte |" in (run_dir / "model" / "README.md").read_text()


def test_disk_full_stops_with_one_sentence_and_the_run_goes_on(make_recipe, monkeypatch):
    recipe, calls = make_recipe(), 0
    real = checkpoints_module.save_file

    def save_file(*args):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "save_file", save_file)
        with pytest.raises(UserError, match=r"step-8 cannot be written \(the disk is full\); .*step 4 is intact"):
            pretrain(recipe)
    assert same(weights_of(pretrain(recipe, resume=True)), weights_of(pretrain(make_recipe("straight"))))


def test_disk_full_at_the_very_end(make_recipe, monkeypatch):
    recipe = make_recipe(train__steps=2)

    def write_text(self, text, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(
            "rorqual.train.release.model_card", lambda *_: patch.setattr(Path, "write_text", write_text) or ""
        )
        with pytest.raises(UserError, match=r"README.md cannot be written \(the disk is full\); .* with --resume"):
            pretrain(recipe)
    assert (pretrain(recipe, resume=True) / "ledger.json").exists()


def test_mismatches_are_named(make_recipe):
    recipe = make_recipe(train__steps=2)
    pretrain(recipe)
    with pytest.raises(UserError, match="already holds a run; continue it with --resume"):
        pretrain(recipe)
    with pytest.raises(UserError, match=r"optimizer.lr was 0.003 and is 0.01 now"):
        pretrain(make_recipe(train__steps=2, optimizer__lr=0.01), resume=True)
    with pytest.raises(UserError, match=r"train.ema was not set and is 0.9 now"):
        pretrain(make_recipe(train__steps=2, train__ema=0.9), resume=True)
    pretrain(make_recipe(train__steps=2, train__keep=5), resume=True)  # what does not change the weights may change


def test_a_vocabulary_too_small_for_the_tokenizer(make_recipe):
    recipe = make_recipe()
    recipe.model.config["vocab_size"] = 290
    with pytest.raises(UserError, match=r"model.config.vocab_size = 290: the tokenizer has 300 tokens"):
        pretrain(recipe)


def test_training_goes_on_from_a_model(make_recipe):
    first = pretrain(make_recipe("first"))
    recipe = make_recipe("second", model__path=str(first / "model"), model__config=None, train__steps=1)
    lines = metrics_of(pretrain(recipe))
    assert lines[0]["loss"] < metrics_of(first)[0]["loss"] - 0.3
