"""The GPUs of a run on Ray: one of this machine for the trainer, and one for each rollout worker, or shares of them.

Ray gives each GPU, or share, away once, and shows a worker its own alone. The trainer is no actor, so one that does
nothing but hold a GPU keeps the trainer's from others.
"""

import os
from importlib import import_module
from typing import Any

import torch

from rorqual.errors import UserError
from rorqual.kernels.devices import AUTO, check_device, gpu_count, take_gpu
from rorqual.ray_start import LOCAL, reason
from rorqual.recipe import RLRecipe

HOLD_SECONDS = 60.0  # until Ray has a GPU of this machine for the trainer


class Holder:
    """An actor that has the trainer's GPU."""

    def name(self) -> str:
        """What CUDA_VISIBLE_DEVICES calls it."""
        ray: Any = import_module("ray")
        return str(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])


def share(recipe: RLRecipe) -> float:
    """GPUs of a worker, and of the trainer: one, or a part of one."""
    return recipe.rollouts.gpus or 1.0


def places(gpus: float, share: float) -> int:
    """Workers that so many GPUs have room for; none is spread over two."""
    return int(gpus) * int(1 / share + 1e-9)


def worker_places(ray: Any, share: float) -> list[int]:
    """Workers that the GPUs of each machine that is alive have room for, beside the trainer on this one; -1: here is
    no room for the trainer.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [places(node["Resources"].get("GPU", 0), share) - (node["NodeID"] == here) for node in nodes]


def trainer_device(ray: Any, recipe: RLRecipe) -> tuple[torch.device, Any]:
    """The device that a run in this cluster trains on, as its workers sample on their own ones; and the actor that
    holds it.

    It is a GPU where the recipe says so, or where it leaves it open and there is room for all. Raises UserError where
    the cluster, or this machine, has too few.
    """
    if recipe.device == "cpu":
        return torch.device("cpu"), None
    room = worker_places(ray, share(recipe))
    if not _asked(recipe) and (min(room) < 0 or sum(room) < (recipe.rollouts.workers or 1) or not gpu_count()):
        return torch.device("cpu"), None
    check_gpus(recipe, ray.cluster_resources().get("GPU", 0), sum(room))
    if min(room) < 0:
        raise UserError(
            "device cuda: Ray has no GPU of this machine for the trainer; start the run on a machine of the cluster "
            "that has one, or add device=cpu"
        )
    return _hold(ray, share(recipe))


def device_here(recipe: RLRecipe, address: str) -> torch.device:
    """`trainer_device`, as far as this machine alone tells. Raises UserError where it has too few GPUs."""
    if recipe.device == "cpu" or not (gpu_count() or _asked(recipe)):
        return torch.device("cpu")
    room, workers = places(gpu_count(), share(recipe)) - 1, recipe.rollouts.workers or 1
    if address != LOCAL:
        room = workers  # which the cluster has, or will not
    if room < workers and not _asked(recipe):
        return torch.device("cpu")
    check_gpus(recipe, gpu_count(), room)
    return torch.device("cuda", 0)


def check_gpus(recipe: RLRecipe, found: float, room: int) -> None:
    """Raises UserError where this machine has no GPU, and where `found` have room for fewer workers than wanted."""
    if not gpu_count():
        check_device("cuda")
    workers, part = recipe.rollouts.workers or 1, share(recipe)
    if room < workers:
        raise UserError(
            f"rollouts.workers = {workers}, each with rollouts.gpus = {part:g}, and the trainer with as much: "
            f"{found:g} GPUs have room for {max(0, room)} workers; lower one of the two, or add device=cpu"
        )


def _asked(recipe: RLRecipe) -> bool:
    return recipe.device != AUTO or recipe.rollouts.gpus is not None


def _hold(ray: Any, share: float) -> tuple[torch.device, Any]:
    """Have Ray give this process a GPU of its machine."""
    affinity = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    here = affinity(ray.get_runtime_context().get_node_id(), soft=False)
    holder = ray.remote(num_cpus=0, num_gpus=share)(Holder).options(scheduling_strategy=here).remote()
    try:
        name = ray.get(holder.name.remote(), timeout=HOLD_SECONDS)
    except ray.exceptions.RayError as e:
        raise UserError(
            f"device cuda: Ray has no GPU of this machine for the trainer ({reason(e)}); end what else uses them, "
            "start the run on another machine of the cluster, or add device=cpu"
        ) from e
    index = visible_index(name)
    if index is None:
        raise UserError(
            f"device cuda: Ray gives the trainer GPU {name}, which CUDA_VISIBLE_DEVICES hides from it; start Ray and "
            "the run with the same one"
        )
    return take_gpu(index), holder


def visible_index(name: str) -> int | None:
    """PyTorch's number of a GPU that CUDA_VISIBLE_DEVICES calls so; None: this process does not see it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(gpu_count())] if visible is None else [n.strip() for n in visible.split(",")]
    return names.index(name) if name in names else None
