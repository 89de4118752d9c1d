import pytest
import torch

from rorqual.kernels import dense_attention as kernel


def run(function, mask, causal, dtype, groups=3):
    torch.manual_seed(0)
    shapes = ((6, 16), (groups, 16), (groups, 8))
    q, k, v = (torch.randn(2, heads, 33, width).to(dtype).requires_grad_() for heads, width in shapes)
    out = function(q, k, v, mask, causal, 0.25)
    return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out) + 0.1 * out.detach())


@pytest.mark.parametrize("chunk", [1, 1 << 20])  # one sequence at a time, and all at once
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_products_are_as_near_to_float32_as_the_fused_kernel(monkeypatch, groups, masked, chunk):
    monkeypatch.setattr(kernel, "CHUNK_BYTES", chunk)
    mask = None
    if masked:
        documents = torch.arange(33) // 10
        mask = ((documents[:, None] == documents) & torch.ones(33, 33, dtype=torch.bool).tril()).expand(2, 1, 33, 33)
    exact = run(kernel.attention_reference, mask, not masked, torch.float32, groups)
    ours = run(kernel.attention, mask, not masked, torch.bfloat16, groups)
    fused = run(kernel.attention_reference, mask, not masked, torch.bfloat16, groups)
    for mine, theirs, right in zip(ours, fused, exact, strict=True):
        assert (mine - right).norm() < 1.5 * (theirs - right).norm() + 1e-3


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_sequences_end_to_end_are_as_one_by_one(monkeypatch, dtype, tolerance, chunk):
    """Two sequences of 9 tokens, one of 5, three of 4, each with a mask of its own."""
    monkeypatch.setattr(kernel, "CHUNK_BYTES", chunk)
    torch.manual_seed(0)
    shapes = [(2, 9), (1, 5), (3, 4)]
    masks = tuple((torch.rand(n, 1, t, t) < 0.7).tril() | torch.eye(t, dtype=torch.bool) for n, t in shapes)
    total = sum(n * t for n, t in shapes)
    q, k, v = (torch.randn(1, heads, total, 8).to(dtype).requires_grad_() for heads in (6, 3, 3))
    weights = torch.randn(1, 6, total, 8)
    out = kernel.attention(q, k, v, masks, False, 0.4)
    found = out, *torch.autograd.grad(out, (q, k, v), weights.to(dtype))
    whole = torch.block_diag(*(m for mask in masks for m in mask[:, 0].float())).bool()[None, None]
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    out = kernel.attention_reference(*exact, whole, False, 0.4)
    for mine, right in zip(found, (out, *torch.autograd.grad(out, exact, weights)), strict=True):
        assert mine.shape == right.shape
        assert (mine - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("shape", [(4, 1, 1, 4), (1, 1, 4, 4), (4, 1, 4, 4)])
@pytest.mark.parametrize("turned", [False, True])
def test_masks_broadcast_and_lie_as_they_may(shape, turned):
    torch.manual_seed(0)
    mask = torch.rand(shape) < 0.7
    mask[..., 0] = True
    if turned and shape[2] > 1:
        mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    q, k, v = (torch.randn(4, 3, 4, 8).bfloat16().requires_grad_() for _ in range(3))
    exact = kernel.attention_reference(q.float(), k.float(), v.float(), mask, False, 0.4)
    torch.testing.assert_close(kernel.attention(q, k, v, mask, False, 0.4).float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("batch", [1, 2])  # masks of their own
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize(
    ("queries", "keys", "width", "value_width"), [(5, 5, 16, 16), (150, 150, 48, 32), (70, 131, 64, 64)]
)
def test_hidden_tiles_are_left_out(queries, keys, width, value_width, groups, batch):
    """Documents, so that tiles are hidden, whole and in between; some queries see nothing."""
    torch.manual_seed(0)
    documents = torch.randint(2, 60, (batch, 1)) + torch.arange(max(queries, keys))
    mask = documents[:, -queries:, None] // 60 == documents[:, None, :keys] // 60
    mask = (mask & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)).unsqueeze(1)
    mask[:, :, 3] = False
    shapes = (6, queries, width), (groups, keys, width), (groups, keys, value_width)
    q, k, v = (torch.randn(2, *shape) for shape in shapes)
    assert kernel.skips_hidden(q.dtype, width, value_width) == (kernel.cpu.capability() is not None)
    weights = torch.randn(2, 6, queries, value_width)
    found = gradients(kernel.attention, (q, k, v), mask, weights)
    torchs = gradients(kernel.attention_reference, (q, k, v), mask, weights)
    exact = gradients(kernel.attention_reference, (q.double(), k.double(), v.double()), mask, weights.double())
    for mine, theirs, right in zip(found, torchs, exact, strict=True):
        assert (mine - right).norm() < 2 * (theirs - right).norm() + 1e-6 * right.norm()


@pytest.mark.parametrize("which", range(3))
def test_what_is_not_finite_stays_so(which):
    """So that training skips its step."""
    tensors = [torch.ones(1, 1, 70, 16) for _ in range(3)]
    tensors[which][:, :, 66] = torch.nan
    mask = torch.ones(1, 1, 70, 70, dtype=torch.bool).tril()
    out, *grads = gradients(kernel.attention, tensors, mask, torch.ones(1, 1, 70, 16))
    assert out[0, 0, 66].isnan().all()
    assert grads[0].isnan().any()


def gradients(function, tensors, mask, weights):
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = function(*tensors, mask, False, 2.0)
    return out, *torch.autograd.grad(out, tensors, weights)


def test_masks_that_do_not_cover_the_row_are_refused():
    q = torch.randn(1, 1, 4, 8).bfloat16().requires_grad_()
    masks = tuple(torch.ones(1, 1, t, t, dtype=torch.bool) for t in (2, 1))
    with pytest.raises(ValueError, match="do not cover one row of 4 tokens"):
        kernel.attention(q, q, q, masks, False, 1.0)


@pytest.mark.parametrize(
    ("length", "dtype", "grad", "fused"),
    [
        (5, torch.bfloat16, True, True),
        (4, torch.float32, True, True),
        (4, torch.bfloat16, False, True),
        (4, torch.bfloat16, True, False),
    ],
)
def test_long_sequences_float32_and_inference_take_the_fused_kernel(monkeypatch, length, dtype, grad, fused):
    monkeypatch.setattr(kernel, "MAX_PLAIN_KEYS", 4)
    q = torch.randn(1, 1, length, 8, dtype=dtype)
    with torch.set_grad_enabled(grad), torch.profiler.profile() as seen:
        assert kernel.attention(q, q, q, None, True, 1.0).isfinite().all()
    assert ("aten::scaled_dot_product_attention" in {event.key for event in seen.key_averages()}) == fused
