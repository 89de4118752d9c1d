import math

import pytest
import torch

from rorqual.kernels import cross_entropy
from rorqual.kernels.reverse_kl import reverse_kl, reverse_kl_reference


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (9, 8), (40, 8), (9, 5), (40, 5)
    found = [torch.randn(*shape, dtype=dtype) for shape in shapes]
    return [t.requires_grad_(i < 2) for i, t in enumerate(found)]


def test_by_hand():
    half, quarter = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    student = torch.cat([half, half]), torch.ones(1, 1)
    teacher = torch.cat([quarter, (1 - quarter.exp()).log()]), torch.ones(1, 1)
    found = reverse_kl(student[1], student[0], teacher[1], teacher[0])
    assert found.item() == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))


@pytest.mark.parametrize("chunk", [1024, 4])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_it_matches_the_reference(monkeypatch, chunk, temperature):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", chunk)
    inputs, slopes = tensors(), torch.randn(9)
    slopes[3] = 0.0
    found, expected = reverse_kl(*inputs, temperature), reverse_kl_reference(*inputs, temperature)
    assert torch.allclose(found, expected, atol=1e-5)
    gradients = torch.autograd.grad(found, inputs[:2], slopes)
    wanted = torch.autograd.grad(expected, inputs[:2], slopes)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(gradients, wanted, strict=True))


def test_among_the_allowed_tokens():
    inputs = tensors()
    allowed = torch.rand(9, 40) < 0.3
    allowed[:, 0] = True
    found = reverse_kl(*inputs, allowed=lambda rows: allowed[rows])
    for i in range(9):
        hidden, weight, teacher, head = (t.detach() for t in inputs)
        own = reverse_kl_reference(hidden[i : i + 1], weight[allowed[i]], teacher[i : i + 1], head[allowed[i]])
        assert found[i].item() == pytest.approx(own.item(), abs=1e-5)


def test_equal_distributions_have_none():
    hidden, weight, _, _ = tensors()
    found = reverse_kl(hidden, weight, hidden.detach(), weight.detach())
    assert found.abs().max() < 1e-6
    assert torch.autograd.grad(found.sum(), hidden)[0].abs().max() < 1e-5
