"""Packing what a GGUF file holds: the numbers are those that the gguf library expands, wherever slices end."""

import numpy as np
import pytest
import torch
from gguf import dequantize

from helpers.gguf_files import KINDS, quantised
from rorqual.checkpoint import gguf_import
from rorqual.checkpoint.gguf_file import GGUFTensor
from rorqual.errors import UserError
from rorqual.kernels import quantized_linear
from rorqual.precision.gguf_weights import pack_stored


def stored(folder, kind, *shape):
    """A tensor of random numbers in a file of its own, and the numbers."""
    values = np.random.default_rng(len(list(folder.iterdir()))).normal(0, 0.05, shape).astype(np.float32)
    data = quantised(values, kind)
    path = folder / f"{len(list(folder.iterdir()))}.blocks"
    path.write_bytes(b"before" + data.tobytes())
    return GGUFTensor(path, "w", kind, shape, 6), torch.from_numpy(dequantize(data, kind).reshape(shape))


def apart(packed, expected):
    found = torch.stack([quantized_linear.dequantize(packed, e) for e in range(len(packed))])
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("kind", "format", "error"),
    [
        (KINDS.Q4_0, "int4", 1e-7),
        (KINDS.Q4_1, "int4_mins", 1e-6),
        (KINDS.Q8_0, "int8_groups", 1e-7),
        (KINDS.Q4_K, "int4_mins", 1e-3),
        (KINDS.Q6_K, "int8_groups", 5e-3),
        (KINDS.F16, "int8_groups", 5e-3),
        (KINDS.BF16, "int8_groups", 5e-3),
        (KINDS.F32, "int8_groups", 5e-3),
    ],
)
@pytest.mark.parametrize("slice", [1, 1 << 13])
def test_numbers_are_the_librarys(tmp_path, monkeypatch, slice, kind, format, error):
    monkeypatch.setattr(gguf_import, "SLICE_NUMBERS", slice)
    tensor, expected = stored(tmp_path, kind, 40, 512)
    packed = pack_stored([tensor])
    assert packed.format == format
    assert apart(packed, expected[None]) <= error


@pytest.mark.parametrize("rows", [16, 40, 7])
def test_experts_whose_outputs_follow_one_another(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(gguf_import, "SLICE_NUMBERS", 1)
    (gate, gates), (up, ups) = (stored(tmp_path, KINDS.Q4_0, 3, rows, 64) for _ in range(2))
    packed = pack_stored([gate, up])
    assert (packed.format, len(packed), packed.N, packed.K) == ("int4", 3, 2 * rows, 64)
    assert apart(packed, torch.cat([gates, ups], dim=1)) < 1e-7


@pytest.mark.parametrize("head", [8, 20, 96])
def test_heads_are_put_in_order_slice_by_slice(tmp_path, monkeypatch, head):
    monkeypatch.setattr(gguf_import, "SLICE_NUMBERS", 1)
    tensor, values = stored(tmp_path, KINDS.Q4_1, 5 * head, 32)
    pairs = values.view(5, head // 2, 2, 32)
    assert apart(pack_stored([tensor], head), pairs.transpose(1, 2).reshape(1, 5 * head, 32)) < 1e-6


def test_scales_that_16_bits_cannot_hold(tmp_path):
    tensor, _ = stored(tmp_path, KINDS.F32, 2, 32)
    tensor.path.write_bytes(b"before" + np.full((2, 32), 1e30, np.float32).tobytes())
    with pytest.raises(UserError, match="overflow FP16 scales"):
        pack_stored([tensor])
