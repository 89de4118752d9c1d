"""GGUF files stay packed: the numbers are those that the gguf library expands."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize

from rorqual.kernels.lowbit import unpack
from rorqual.precision.gguf import _pack

KINDS = GGMLQuantizationType


class Stored:
    """A tensor as gguf's reader gives it."""

    def __init__(self, data, kind, shape):
        self.data, self.tensor_type, self.shape = data, kind, shape


def blocks_of(kind, rows, width):
    """Random bytes of a type, its scales being small numbers."""
    rng = np.random.default_rng(0)
    if kind in (KINDS.Q4_K, KINDS.Q6_K):
        size = {KINDS.Q4_K: 144, KINDS.Q6_K: 210}[kind]
        data = rng.integers(0, 256, (rows, width // 256, size), dtype=np.uint8)
        scales = rng.uniform(0.001, 0.01, (rows, width // 256, 2)).astype(np.float16).view(np.uint8)
        if kind == KINDS.Q4_K:
            data[..., :4] = scales
        else:
            data[..., -2:] = scales[..., :2]
        return data.reshape(rows, -1)
    return quantize(rng.normal(0, 0.05, (rows, width)).astype(np.float32), kind)


@pytest.mark.parametrize(
    ("kind", "format", "error"),
    [
        (KINDS.Q4_0, "int4", 1e-7),
        (KINDS.Q4_1, "int4_mins", 1e-6),
        (KINDS.Q8_0, "int8_groups", 1e-7),
        (KINDS.Q4_K, "int4_mins", 1e-3),
        (KINDS.Q6_K, "int8_groups", 5e-3),
        (KINDS.F16, "int8_groups", 5e-3),
        (KINDS.F32, "int8_groups", 5e-3),
    ],
)
def test_numbers_are_the_librarys(kind, format, error):
    data = blocks_of(kind, 40, 512)
    packed = _pack(Stored(data, kind, (512, 40)), "w", None)
    theirs = torch.from_numpy(dequantize(data, kind).astype(np.float32))
    assert packed.format == format
    assert float((unpack(packed) - theirs).abs().max()) <= error * float(theirs.abs().max())
