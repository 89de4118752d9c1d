"""Plans on this machine's processor."""

import pytest
import torch

from rorqual.errors import UserError
from rorqual.kernels.dtypes import compute_dtype
from rorqual.plan import this_machine
from rorqual.plan.chips import find_chip
from rorqual.plan.cpu_time import costs_here, step_counts
from rorqual.plan.estimate import predict
from rorqual.plan.hardware import memory_total
from rorqual.plan.known_models import find_model
from rorqual.plan.plan_stage import plan_stage
from rorqual.plan.process_memory import memory
from rorqual.plan.request import parse_request
from rorqual.plan.training_plan import Question, plan_training
from rorqual.recipe import parse_recipe

MODEL = find_model("smollm2-135m")


def test_this_machine_is_a_chip():
    chip = find_chip("cpu")
    assert chip.memory == memory_total()
    assert chip.per_node == 1
    assert chip.peak.keys() == {"float32", "bfloat16"}
    assert 1e9 < chip.bandwidth < 1e13
    assert chip.price is None


def test_a_training_here_is_steps_of_its_counts():
    plan = plan_training(Question(MODEL, find_chip("cpu"), 1e6, length=512, batch=16, price=0.5))
    dtype = compute_dtype("auto")
    costs = costs_here(dtype)
    step = costs.seconds(step_counts(MODEL, [(16, 512)], dtype.itemsize, False))
    assert plan.seconds.value == pytest.approx(step * 1e6 / (16 * 512))
    assert plan.cost.value == pytest.approx(0.5 * plan.seconds.value / 3600)
    assert (plan.seconds.low, plan.seconds.high) == pytest.approx(costs.interval(plan.seconds.value))
    assert sum(plan.parts.values()) == pytest.approx(plan.seconds.value)
    name = "float32" if dtype is torch.float32 else "bfloat16"
    assert sum(plan.memory.values()) == memory(MODEL, 16 * 512, dtype=name).total


def test_what_does_not_fit_is_said(monkeypatch):
    with pytest.raises(UserError, match=r"does not fit on this machine: training needs .* more than it has"):
        plan_training(Question(find_model("deepseek-v3"), find_chip("cpu"), 1e6))
    with pytest.raises(UserError, match=r"--days 0\.001: this machine needs"):
        plan_training(Question(MODEL, find_chip("cpu"), 1e9, days=0.001))
    for kind, more in (("pretrain", {"tokens": 1e6}), ("rl", {"steps": 2}), ("eval", {})):
        request = parse_request(kind, {"model": "smollm2-135m", "gpu": "cpu", "gpus": 2, **more}, str)
        with pytest.raises(UserError, match="--gpus 2: cpu is one machine"):
            plan_stage(request)


def test_a_recipe_that_does_not_fit_is_said():
    recipe = parse_recipe(
        {"name": "large", "model": {"config": {}}, "data": {"sources": [{"path": "a.txt"}]}, "train": {"steps": 2}},
        "pretrain",
    )
    config = find_model("deepseek-v3")
    with pytest.raises(UserError, match=r"large does not fit on this machine: training needs .* more than it has"):
        this_machine.predicted_here(recipe, config, predict(config, recipe), None)


def test_what_a_run_predicts_of_itself():
    recipe = parse_recipe(
        {"name": "run", "model": {"config": {}}, "data": {"sources": [{"path": "a.txt"}]}, "train": {"epochs": 2.0}},
        "pretrain",
    )
    predicted = {
        "tokens": 1000.0, "seconds": 10.0, "tokens_per_second": 100.0, "tokens_per_second_interval": (50.0, 200.0),
        "memory": {"weights": 5, "total": 5}, "flops_per_token": 7.0, "calibration": "as measured",
    }  # fmt: skip
    plan = this_machine.predicted_here(recipe, MODEL, predicted, 3600.0)
    assert vars(plan.seconds) == {"value": 10.0, "low": 5.0, "high": 20.0}
    assert plan.cost.value == pytest.approx(10)
    assert plan.memory == {"weights": 5, "update": 0}
    with pytest.raises(UserError, match=r"run: train.epochs = 2: how many steps those are is known once"):
        this_machine.predicted_here(recipe, MODEL, predicted | {"seconds": None}, None)
