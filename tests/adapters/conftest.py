"""A small model of every kind of linear, and recipes' sections."""

import pytest
import torch

from helpers.training import CONFIG
from rorqual.model import Transformer


@pytest.fixture
def latent():
    """A DeepSeek-V3-style model: latent attention, shared and routed experts, a multi-token module."""
    torch.manual_seed(0)
    return Transformer(CONFIG)
