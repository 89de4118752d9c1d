"""Loss spikes: what counts as one, and a run that goes on, stops or rolls back."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from helpers.processes import run
from rorqual.data.loader import Loader
from rorqual.errors import Stopped, UserError
from rorqual.recipe import PretrainRecipe, SpikesSection, parse_recipe
from rorqual.train.spikes import Spikes
from rorqual.train.trainer import Trainer
from rorqual.train.training_run import pretrain

NEVER = 299  # a token that the text does not have, as every target of a step: a gradient far above the others


def test_what_counts_as_a_spike():
    """Of 1 … 8 the median is 4.5 and the median deviation 2, so 2 robust deviations above are 10.43."""
    spikes = Spikes(SpikesSection(window=8, threshold=2.0))
    assert spikes.find(1.0, 1e9) is None  # there is nothing to compare it with
    for value in range(2, 9):
        assert spikes.find(float(value), 1.0) is None
    state = json.loads(json.dumps(spikes.state()))
    assert spikes.find(10.4, 1.0) is None
    for grad_norms in ((1.03, 1.01, 1.03), (1.03, 1.03)):  # the bound is 1.02, 2 times 1 % above 1
        spikes.load(state)
        *before, found = [spikes.find(4.5, grad_norm) for grad_norm in grad_norms]
        assert not any(before)
    assert found.startswith("the gradient norm is 1.03, above 1.02 ")
    spikes.load(state)
    assert spikes.find(10.5, 1e9) == "the loss is 10.5, above 10.43 (spikes.threshold) after a median of 4.5"


def spoil(loader_next, first, last, weights=False):
    """`Loader.next`, with nonsense in the rows from `first` to `last`: targets, or weights that are not finite."""

    def spoilt(self, size):
        at = int(self.drawn.sum())
        batch = loader_next(self, size)
        if not first <= at < last:
            return batch
        if weights:
            return replace(batch, weights=torch.full_like(batch.weights, float("nan")))
        return replace(batch, targets=torch.full_like(batch.targets, NEVER))

    return spoilt


def without(loader_next, first, last):
    """`Loader.next` of data that lacks these rows."""

    def shorter(self, size):
        if int(self.drawn.sum()) == first:
            self.drawn += last - first
        return loader_next(self, size)

    return shorter


@pytest.fixture
def recipe_of(make_recipe):
    """Steps of 4 rows, checkpoints at multiples of 4."""

    def make(name="run", action="roll-back", **changes):
        changes = {"train__steps": 20, "train__ema": 0.9, "spikes__limit": 1} | changes
        return make_recipe(name, spikes__action=action, spikes__window=8, **changes)

    return make


def lines_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def notes_of(run_dir):
    return [line["note"] for line in lines_of(run_dir) if "note" in line]


def results(run_dir):
    """Weights, the last checkpoint, and the metrics but for times."""
    drop = ("seconds", "tokens_per_second", "utilisation", "memory_gb")
    lines = [{k: v for k, v in line.items() if k not in drop} for line in lines_of(run_dir) if "note" not in line]
    files = [*sorted(run_dir.glob("model/*.safetensors")), *sorted(run_dir.glob("checkpoints/step-20/*.safetensors"))]
    assert len(files) > 1
    return [load_file(file) for file in files], lines


def assert_same(one, other):
    (tensors, lines), (tensors_, lines_) = results(one), results(other)
    for found, right in zip(tensors, tensors_, strict=True):
        assert found.keys() == right.keys()
        assert all(torch.equal(found[name], right[name]) for name in found)
    assert lines == lines_


SPIKE = (52, 60)  # rows of steps 14 and 15, after the checkpoint of step 12


@pytest.mark.parametrize(
    ("rows", "weights", "said"),
    [
        (SPIKE, False, "step 15: the gradient norm is "),
        ((52, 64), True, "step 16: the loss was not finite 3 times in a row; "),
    ],
    ids=["spike", "not finite"],
)
def test_a_roll_back_leaves_the_data_out(recipe_of, monkeypatch, rows, weights, said):
    """The run ends with the bits of one whose data lacks what lies between the checkpoint and the spike."""
    real = Loader.next
    monkeypatch.setattr(Loader, "next", spoil(real, *rows, weights))
    rolled_back = pretrain(recipe_of())
    monkeypatch.setattr(Loader, "next", without(real, 48, rows[1]))
    assert_same(rolled_back, pretrain(recipe_of("without")))
    note = notes_of(rolled_back)[-1]
    assert note.startswith(said)
    assert note.endswith("rolled back to step 12, without the data since then (1 of at most 1 times)")
    assert [line["step"] for line in lines_of(rolled_back) if "note" not in line] == list(range(1, 21))


@pytest.mark.slow
def test_without_a_checkpoint_it_rolls_back_to_the_start(recipe_of, monkeypatch):
    real, changes = Loader.next, {"train__save_every": 20}
    monkeypatch.setattr(Loader, "next", spoil(real, *SPIKE))
    rolled_back = pretrain(recipe_of(**changes))
    monkeypatch.setattr(Loader, "next", without(real, 0, 60))
    assert_same(rolled_back, pretrain(recipe_of("without", **changes)))


class Crash(BaseException):
    """Stands for SIGKILL within a process: nothing may catch it."""


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("way", "call"),
    [
        pytest.param("killed", 16, marks=slow),
        ("stopped", 16),
        *(pytest.param("killed", call, marks=slow) for call in (14, 15, 17, 18, 20)),
        *(pytest.param("stopped", call, marks=slow) for call in (14, 15, 17, 18, 20)),
    ],
)
def test_a_run_that_ends_around_a_roll_back_goes_on(recipe_of, monkeypatch, call, way):
    """The 15th step rolls back; the 18th is the 15th again, and the 20th comes after the next checkpoint."""
    monkeypatch.setattr(Loader, "next", spoil(Loader.next, *SPIKE))
    straight = pretrain(recipe_of("straight", train__keep=1))
    real, calls = Trainer.step, 0

    def step(self, *args):
        nonlocal calls
        calls += 1
        if calls == call and way == "killed":
            raise Crash
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    recipe = recipe_of("ended", train__keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Crash if way == "killed" else Stopped):
            pretrain(recipe)
    assert_same(straight, pretrain(recipe, resume=True))
    assert notes_of(recipe.run_dir) == notes_of(straight)


def test_more_roll_backs_than_the_limit_stop_the_run(recipe_of, monkeypatch):
    monkeypatch.setattr(Loader, "next", spoil(Loader.next, 52, 68))
    with pytest.raises(
        UserError, match=r"step 14: the gradient .* spikes.limit = 1 times, .* step 12 kept; .*--resume"
    ):
        pretrain(recipe_of())
    with pytest.raises(UserError, match=r"train.save_every was 4 and is 2 now"):
        pretrain(recipe_of(train__save_every=2), resume=True)
    ended = pretrain(recipe_of(spikes__limit=2), resume=True)
    assert [note[:8] for note in notes_of(ended)] == ["step 15:", "step 14:"]


def test_a_spike_stops_the_run_or_not(recipe_of, monkeypatch):
    monkeypatch.setattr(Loader, "next", spoil(Loader.next, 52, 64))
    with pytest.raises(
        UserError, match=r"step 15: the gradient .*, so training stopped with the checkpoint of step 12"
    ):
        pretrain(recipe_of(action="stop"))
    assert lines_of(recipe_of().run_dir)[-1]["step"] == 15
    assert max(int(path.name[5:]) for path in recipe_of().run_dir.glob("checkpoints/*")) == 12
    went_on = pretrain(recipe_of(action="continue"), resume=True)
    assert_same(went_on, pretrain(recipe_of("never", action="stop", spikes__threshold=1e6)))
    (note,) = notes_of(went_on)  # the spike lasts two steps, 15 and 16
    assert note.startswith("step 15: the gradient norm is ")


def on_ranks(rank, spiked, without_it):
    real = Loader.next
    for raw, change, first, last in ((spiked, spoil, *SPIKE), (without_it, without, 48, 60)):
        Loader.next = change(real, first, last)
        pretrain(parse_recipe(raw, PretrainRecipe))


def test_several_processes_roll_back_together(recipe_of):
    """Each has a part of every checkpoint."""
    recipes = [recipe_of(name, parallel={"data": 2, "experts": 2}) for name in ("spiked", "without")]
    run(2, on_ranks, *(recipe.model_dump() for recipe in recipes))
    assert_same(*(recipe.run_dir for recipe in recipes))
    (note,) = notes_of(recipes[0].run_dir)
    assert note.endswith("rolled back to step 12, without the data since then (1 of at most 1 times)")
