"""Whole linears by the kernels against the same by the references."""

import pytest
import torch

from rorqual.kernels import gpu
from rorqual.kernels.number_formats import E5M6_TILE, FP8_BLOCK, FP8_TENSOR, FP8_TILE, MXFP8, with_powers_of_two
from rorqual.kernels.scaled_linear import LinearFormats, scaled_feed_forward, scaled_linear

V3 = LinearFormats(FP8_TILE, FP8_BLOCK, FP8_BLOCK, FP8_TILE, FP8_TILE)
MX = LinearFormats(MXFP8, MXFP8, MXFP8.transposed, MXFP8, MXFP8)
AFTER_ATTENTION = LinearFormats(with_powers_of_two(FP8_TILE), FP8_BLOCK, FP8_BLOCK, FP8_TILE, E5M6_TILE)
TENSOR = LinearFormats(FP8_TENSOR, FP8_TENSOR, FP8_TENSOR, FP8_TENSOR, FP8_TENSOR)


@pytest.fixture
def kernels(device, monkeypatch):
    """Turns the kernels on, also where the interpreter runs them."""

    def use():
        chip = gpu.Chip((8, 9), (12, 8), True)
        monkeypatch.setattr(gpu, "chip", lambda _: chip)

    return use


def results(function, *inputs):
    """Result and gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    torch.manual_seed(9)
    out.backward(torch.randn(out.shape).to(out))
    return [out.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]


def close(found, right, bound):
    assert len(found) == len(right)
    for a, b in zip(found, right, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= bound * b.double().norm()


@pytest.mark.parametrize("formats", [V3, MX, AFTER_ATTENTION, TENSOR], ids=["fp8", "mxfp8", "o_proj", "tensor"])
def test_linear(kernels, device, formats):
    torch.manual_seed(0)
    x, w = torch.randn(2, 19, 200), torch.randn(70, 200)
    right = results(lambda x, w: scaled_linear(x, w, None, formats), x, w)
    kernels()
    close(results(lambda x, w: scaled_linear(x, w, None, formats), x.to(device), w.to(device)), right, 2e-6)


@pytest.mark.parametrize("formats", [V3, MX], ids=["fp8", "mxfp8"])
@pytest.mark.parametrize("width", [48, 128])
def test_feed_forward_of_experts(kernels, device, formats, width):
    """A code at a tie may differ by one, since exponentials do in their last bits."""
    torch.manual_seed(0)
    ends = torch.tensor([0, 17, 17, 40, 190], dtype=torch.int32)
    x, gate_up, down = torch.randn(190, 64), torch.randn(5, 2 * width, 64) / 8, torch.randn(5, 64, width)
    tensors = x, gate_up, down, torch.rand(190)

    def network(x, gate_up, down, weights):
        return scaled_feed_forward(x, gate_up, None, down, ends.to(x.device), formats, weights)

    right = results(network, *tensors)
    kernels()
    close(results(network, *(t.to(device) for t in tensors)), right, 2e-3)
