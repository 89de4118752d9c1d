"""The device that a process computes on."""

import os

import torch

from rorqual.errors import UserError

AUTO = "auto"


def check_device(device: torch.device | str) -> None:
    """Raises UserError for a GPU where PyTorch finds none."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: PyTorch finds no GPU here; leave it out to compute on the CPU")


def find_device(name: str = AUTO, processes: int | None = None) -> torch.device:
    """The device that a recipe or an option names, for this process; "auto": a GPU where PyTorch finds one for each
    process of this machine, else the CPU.

    processes: of this machine; None: those that torchrun has started.

    Processes started by torchrun take the GPU of their own number on the machine. Raises UserError where there are too
    few GPUs.
    """
    if name == "cpu":
        return torch.device("cpu")
    here = int(os.environ.get("LOCAL_RANK", "0"))
    needed = processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = gpu_count()
    if found < needed:
        if name == AUTO:
            return torch.device("cpu")
        check_device(name)
        raise UserError(f"device cuda: {needed} processes here need a GPU each, and there are {found}; start {found}")
    return take_gpu(here)


def gpu_count() -> int:
    """GPUs that PyTorch finds for this process."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def take_gpu(index: int) -> torch.device:
    """Make one of them this process's own."""
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
