"""The small models that parity is tested on."""

import pytest
import torch

from helpers.reference_models import CONFIGS, build


@pytest.fixture(scope="module", params=CONFIGS)
def ours(request):
    """A model of every config."""
    return build(CONFIGS[request.param])


@pytest.fixture(scope="module", params=[name for name in CONFIGS if name.startswith("v")])
def latent(request):
    """A model of every config with multi-head latent attention."""
    return build(CONFIGS[request.param])


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(101, (2, 24), generator=torch.Generator().manual_seed(1))
