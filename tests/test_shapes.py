"""Shapes in annotations are checked in every test (helpers/shape_checks.py), and cost nothing elsewhere."""

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from helpers.shape_checks import checked
from helpers.small_configs import GROUPED
from rorqual.kernels.linear import linear
from rorqual.kernels.norm import rms_norm
from rorqual.model import Transformer
from rorqual.model.layers import RMSNorm


def test_a_wrong_argument_is_caught():
    with pytest.raises(TypeCheckError, match="weight"):
        linear(torch.zeros(2, 8), torch.zeros(4, 7))
    with pytest.raises(TypeCheckError, match="weight"):
        rms_norm(torch.zeros(2, 8), torch.ones(1, 8), 1e-6)
    with pytest.raises(TypeCheckError, match="tokens"):
        Transformer(GROUPED)(torch.zeros(5, dtype=torch.long))
    with pytest.raises(TypeCheckError, match="x"):
        RMSNorm(8, 1e-6)(torch.zeros(2, 8, dtype=torch.long))


def test_a_wrong_result_is_caught():
    def halves(x: torch.Tensor) -> torch.Tensor:
        return x[: len(x) // 2] if len(x) > 1 else x

    halves.__annotations__ = dict.fromkeys(("x", "return"), linear.__annotations__["bias"])
    assert len(checked(halves)(torch.zeros(1))) == 1
    with pytest.raises(TypeCheckError, match="return value"):
        checked(halves)(torch.zeros(4))


def test_without_jaxtyping_they_are_tensors():
    code = "from rorqual.kernels.linear import linear_reference as f; print(f.__annotations__['x'].__name__)"
    code += "; import sys; assert not {'jaxtyping', 'beartype'} & {*sys.modules}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "Tensor\n"
