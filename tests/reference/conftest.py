import pytest
import torch

from helpers.reference_models import CONFIGS, build


@pytest.fixture(scope="module", params=CONFIGS)
def ours(request):
    return build(CONFIGS[request.param])


@pytest.fixture(scope="module", params=[name for name in CONFIGS if name.startswith("v")])
def latent(request):
    return build(CONFIGS[request.param])


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(101, (2, 24), generator=torch.Generator().manual_seed(1))
