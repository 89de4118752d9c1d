import pytest
import torch

from rorqual.kernels.moe_permute import (
    permute,
    permute_reference,
    permute_weights,
    sort_by_expert,
    unpermute,
    unpermute_reference,
)


def choices(tokens, k, experts):
    torch.manual_seed(0)
    return torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])


# In double the torch operators run, in the others the compiled functions; 300 is wider than their blocks.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-6), (torch.float, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(7, 2, 3), (1, 1, 1), (50, 4, 16)])
def test_values_and_gradients_equal_the_reference(tokens, k, experts, multiple, dtype, tolerance):
    arrangement = sort_by_expert(choices(tokens, k, experts), experts, multiple)

    def run(there, back, dtype):
        torch.manual_seed(1)
        x = torch.randn(tokens, 300, dtype=torch.double).to(dtype).requires_grad_()
        weights = torch.rand(tokens, k, dtype=torch.double)
        weights = (weights if dtype == torch.double else weights.float()).requires_grad_()  # the router's are FP32
        rows = there(x, arrangement, k)
        factors = torch.linspace(0.5, 1.5, len(rows), dtype=torch.double)[:, None].to(dtype)
        factors = factors * permute_weights(weights, arrangement)[:, None].to(dtype)
        out = back(rows * factors, arrangement, k)
        out.square().sum().backward()
        return out, x.grad, weights.grad

    ours, reference = run(permute, unpermute, dtype), run(permute_reference, unpermute_reference, torch.double)
    for mine, exact in zip(ours, reference, strict=True):
        assert (mine - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("multiple", [1, 8])
def test_every_place_lies_among_its_experts_rows_in_order(multiple):
    chosen = choices(50, 4, 16)
    arrangement = sort_by_expert(chosen, 17, multiple)  # the last expert gets nothing
    ends = arrangement.ends.tolist()
    assert all(end % multiple == 0 for end in ends)
    assert len(arrangement.slot) == ends[-1]
    for e, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        places = [p for p in arrangement.slot[first:last].tolist() if p < chosen.numel()]
        assert places == (chosen.flatten() == e).nonzero()[:, 0].tolist()
        assert last - first - len(places) < multiple
        assert len(places) == arrangement.load[e]
    assert torch.equal(arrangement.slot[arrangement.row], torch.arange(chosen.numel()))


def test_weights_by_row():
    arrangement = sort_by_expert(choices(7, 2, 3), 3, 8)
    weights = torch.rand(7, 2, requires_grad=True)
    rows = permute_weights(weights, arrangement)
    assert torch.equal(rows[arrangement.row], weights.flatten())
    assert torch.equal(rows == 0, arrangement.slot == 14)  # rows that fill up count for nothing
    (rows * torch.arange(len(rows))).sum().backward()
    assert torch.equal(weights.grad.flatten(), arrangement.row.float())
