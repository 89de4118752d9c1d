"""On a GPU the kernels run there; without one, by Triton's interpreter, which is chosen before Triton is imported.

Where Triton is absent (PyTorch's CPU wheels do not bring it) every test of this folder is skipped.
"""

import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device():
    if find_spec("triton") is None:
        pytest.skip("no Triton: pip install triton (its interpreter needs no GPU)")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
