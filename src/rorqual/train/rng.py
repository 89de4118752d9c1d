"""Random number generators: seeded once, saved and restored with checkpoints."""

import random

import numpy as np
import torch
from torch import Tensor


def set_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_tensors() -> dict[str, Tensor]:
    """The state of torch's generators. All other code uses its own generators, seeded by step."""
    out = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # asking a GPU that the run does not use would take memory there
        out["rng.cuda"] = torch.cuda.get_rng_state()
    return out


def load_rng_tensors(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
