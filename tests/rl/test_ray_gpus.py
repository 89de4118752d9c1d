"""Which GPUs a run on Ray takes, and what it says where they are too few."""

import pytest
import torch

from helpers.fake_ray import FakeRay
from rorqual.errors import UserError
from rorqual.ray_start import fair_threads, room
from rorqual.recipe import RLRecipe, parse_recipe
from rorqual.rl import ray_gpus
from rorqual.rl.ray_gpus import device_here, places, trainer_device, visible_index, worker_places
from rorqual.rl.rl_run import in_process, on_ray
from rorqual.rl_sections import RolloutsSection

CPU = torch.device("cpu")


def recipe(device="auto", **rollouts):
    raw = {
        "name": "toy", "model": {"path": "unused"}, "environments": [{"name": "chain_sum"}], "steps": 7,
        "device": device, "rollouts": {"workers": 2} | rollouts,
    }  # fmt: skip
    return on_ray(parse_recipe(raw, RLRecipe))


@pytest.fixture
def gpus(monkeypatch):
    """Sets the number of GPUs that PyTorch finds; Ray then gives the trainer the one that it calls 1."""

    def found(count):
        monkeypatch.setattr(ray_gpus, "gpu_count", lambda: count)

    monkeypatch.setattr(ray_gpus, "_hold", lambda ray, share: (torch.device("cuda", 1), "holder"))
    return found


def test_places():
    assert [places(3, share) for share in (1.0, 0.5, 0.3, 0.1)] == [3, 6, 9, 30]
    ray = FakeRay(cpus=(8, 8, 8), gpus=(2, 4, 0))
    assert worker_places(ray, 1.0) == [1, 4, 0]
    assert worker_places(ray, 0.5) == [3, 8, 0]
    assert worker_places(FakeRay(), 1.0) == [-1]


def test_threads_where_gpus_are():
    assert room([64, 8], 9, [1, 7]) == 1
    assert fair_threads([64, 8], 7, [1, 7]) == 1  # six of them are on the second machine
    assert fair_threads([64, 8], 7) == 9


def test_a_run_takes_gpus_where_all_of_it_fits(gpus):
    gpus(3)
    assert trainer_device(FakeRay(gpus=(3,)), recipe()) == (torch.device("cuda", 1), "holder")
    assert trainer_device(FakeRay(gpus=(3,)), recipe("cpu")) == (CPU, None)
    assert trainer_device(FakeRay(gpus=(2,)), recipe()) == (CPU, None)
    assert trainer_device(FakeRay(gpus=(1,)), recipe(gpus=0.3))[0].type == "cuda"
    assert trainer_device(FakeRay(cpus=(2, 2), gpus=(1, 2)), recipe("cuda"))[0].type == "cuda"
    assert trainer_device(FakeRay(cpus=(2, 2), gpus=(0, 3)), recipe()) == (CPU, None)
    gpus(0)
    assert trainer_device(FakeRay(gpus=(3,)), recipe()) == (CPU, None)


def test_too_few_gpus_are_refused(gpus):
    gpus(2)
    said = r"rollouts.workers = 2, each with rollouts.gpus = {}, .* {} GPUs have room for {} workers; lower one"
    with pytest.raises(UserError, match=said.format(1, 2, 1)):
        trainer_device(FakeRay(gpus=(2,)), recipe("cuda"))
    with pytest.raises(UserError, match=said.format(0.5, 1, 1)):
        trainer_device(FakeRay(gpus=(1,)), recipe(gpus=0.5))
    with pytest.raises(UserError, match="Ray has no GPU of this machine for the trainer"):
        trainer_device(FakeRay(cpus=(2, 2), gpus=(0, 4)), recipe("cuda"))
    gpus(0)
    with pytest.raises(UserError, match="PyTorch finds no GPU here"):
        trainer_device(FakeRay(gpus=(3,)), recipe("cuda"))


def test_what_a_dry_run_can_tell(gpus):
    gpus(0)
    assert device_here(recipe(), "local") == CPU
    with pytest.raises(UserError, match="PyTorch finds no GPU here"):
        device_here(recipe("cuda"), "local")
    gpus(2)
    assert device_here(recipe("cpu"), "local") == device_here(recipe(), "local") == CPU
    assert device_here(recipe(), "auto").type == device_here(recipe(workers=1), "local").type == "cuda"
    with pytest.raises(UserError, match="2 GPUs have room for 1 workers"):
        device_here(recipe("cuda"), "local")


def test_the_trainers_gpu_is_found_by_name(monkeypatch):
    monkeypatch.setattr(ray_gpus, "gpu_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [visible_index(name) for name in ("1", "2")] == [1, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert [visible_index(name) for name in ("5", "1")] == [1, None]


def test_settings_that_cannot_be_honoured_are_refused():
    with pytest.raises(UserError, match=r"rollouts.gpus = 0.5 with device = cpu"):
        recipe("cpu", gpus=0.5)
    raw = recipe().model_copy(update={"rollouts": RolloutsSection(gpus=0.5)})
    with pytest.raises(UserError, match=r"rollouts.gpus = 0.5 needs Ray"):
        in_process(raw)
    with pytest.raises(UserError, match=r"rollouts.gpus"):
        recipe(gpus=2)
