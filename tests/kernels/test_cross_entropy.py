import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rorqual.kernels import cross_entropy as ce


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(ce, "CHUNK_ROWS", 7)  # 50 tokens make eight chunks, the last one short


def inputs(dtype=torch.float32, tokens=50, words=33, width=16):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(words, width, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(words, (tokens,), generator=generator)
    share = torch.randn(tokens, generator=generator)  # negative weights are allowed: advantages in RL
    share[::3] = 0
    return hidden, weight, targets, share


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def test_loss_and_gradients_match_reference():
    hidden, weight, targets, share = inputs()
    ours = ce.linear_cross_entropy(hidden, weight, targets, share)
    plain = ce.linear_cross_entropy_reference(hidden, weight, targets, share)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    # a factor on the loss must reach both gradients
    for a, b in zip(gradients(ours * 3, hidden, weight), gradients(plain * 3, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_compiled_softmax_slope_matches_reference(dtype, tolerance):
    """With a sure and a hopeless target, whose slopes are tiny and full."""
    torch.manual_seed(0)
    logits, targets, share = (4 * torch.randn(6, 77)).to(dtype), torch.randint(77, (6,)), torch.randn(6)
    logits[0, targets[0]], logits[1, targets[1]] = 30, -90
    exact = logits.float().clone()
    right = ce.softmax_grad_reference_(exact, targets, share, 0.7)
    found = ce.softmax_grad_(logits, targets, share, 0.7)
    for mine, reference in zip((*found, logits), (*right, exact), strict=True):
        torch.testing.assert_close(mine.float(), reference, rtol=tolerance, atol=1e-6)


def test_logits_that_are_not_finite_give_a_loss_that_is_not():
    logits = torch.randn(2, 9)
    logits[1, 4] = float("nan")
    logprob, _ = ce.softmax_grad_(logits, torch.tensor([0, 0]), None)
    assert logprob.isfinite().tolist() == [True, False]


def test_a_target_outside_the_vocabulary_is_refused():
    for target in (-1, 9):
        with pytest.raises(IndexError, match="vocabulary of 9"):
            ce.softmax_grad_(torch.randn(1, 9), torch.tensor([target]), None)


def test_chunk_size_does_not_change_the_loss(monkeypatch):
    hidden, weight, targets, share = inputs()
    in_sevens = gradients(ce.linear_cross_entropy(hidden, weight, targets, share), hidden, weight)
    monkeypatch.setattr(ce, "CHUNK_BYTES", 1)  # one token at a time
    one_by_one = gradients(ce.linear_cross_entropy(hidden, weight, targets, share), hidden, weight)
    for a, b in zip(in_sevens, one_by_one, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_tokens_of_weight_zero_need_no_target():
    hidden, weight, targets, share = inputs()
    marked = targets.where(share != 0, -100)
    assert ce.linear_cross_entropy(hidden, weight, marked, share) == ce.linear_cross_entropy(
        hidden, weight, targets, share
    )
    none = ce.linear_cross_entropy(hidden, weight, marked, torch.zeros(50))
    grad_hidden, grad_weight = gradients(none, hidden, weight)
    assert none == 0
    assert not grad_hidden.any()
    assert not grad_weight.any()


def test_bfloat16_stays_near_float32():
    hidden, weight, targets, share = inputs(torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    ours = ce.linear_cross_entropy(hidden, weight, targets, share)
    plain = ce.linear_cross_entropy_reference(*exact, targets, share)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, atol=0.1, rtol=0.01)
    for a, b in zip(gradients(ours, hidden, weight), gradients(plain, *exact), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_wanted_gradients_are_made(frozen):
    tensors = inputs()
    tensors[frozen].requires_grad_(False)
    loss = ce.linear_cross_entropy(*tensors)
    ce.token_logprobs(*tensors[:3])[0].sum().add(loss).backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad is not None


def test_no_grad_makes_no_gradients():
    """Gradients are made in the forward pass; without them it has only the logits' product, of 33 tokens that count."""

    def flops(grad):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            assert ce.linear_cross_entropy(*inputs()).isfinite()
        return counter.get_flop_counts()["Global"][torch.ops.aten.mm]  # the entropy's sum is another product

    assert flops(False) == 2 * 33 * 33 * 16
    assert flops(True) > flops(False)


def test_second_backward_is_refused():
    hidden, *rest = inputs()
    loss = ce.linear_cross_entropy(hidden, *rest)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran already"):
        loss.backward()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropy_match_reference(temperature, known):
    hidden, weight, targets, share = inputs()
    logprobs, entropy = ce.token_logprobs(hidden, weight, targets, temperature, share if known else None)
    plain_logprobs, plain_entropy = ce.token_logprobs_reference(hidden, weight, targets, temperature)
    torch.testing.assert_close(logprobs, plain_logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, plain_entropy, atol=1e-5, rtol=1e-5)
    assert not entropy.requires_grad
    ours = gradients(logprobs @ share, hidden, weight)
    plain = gradients(plain_logprobs @ share, hidden, weight)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_derivative_other_than_announced_is_refused():
    hidden, weight, targets, share = inputs()
    logprobs, _ = ce.token_logprobs(hidden, weight, targets, 1.0, share)
    with pytest.raises(RuntimeError, match="differs from known_grad"):
        (logprobs @ share).mul(2).backward()


def test_nan_passes_on_where_the_slope_was_known():
    hidden, weight, targets, share = inputs()
    broken = torch.cat([hidden[:1] * float("nan"), hidden[1:]])
    logprobs, _ = ce.token_logprobs(broken, weight, targets, 1.0, share)
    (gradient,) = torch.autograd.grad(logprobs @ share, weight)
    assert gradient.isnan().any()
    logprobs, _ = ce.token_logprobs(hidden, weight, targets, 1.0, share)
    (gradient,) = torch.autograd.grad((logprobs @ share) * float("nan"), weight)
    assert gradient.isnan().all()


PEAK = r"""
import re, torch
from pathlib import Path
from rorqual.kernels.cross_entropy import linear_cross_entropy, token_logprobs
# Not getrusage, whose peak survives exec and so begins with the parent's.
memory = lambda field: int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
torch.set_num_threads(1)
dtype = torch.{dtype}
def run(tokens, words):
    hidden = torch.randn(tokens, 16).to(dtype).requires_grad_()
    weight = torch.randn(words, 16).to(dtype).requires_grad_()
    before = memory("VmRSS")
    if "{function}" == "loss":
        linear_cross_entropy(hidden, weight, torch.arange(tokens), torch.ones(tokens)).backward()
    else:
        token_logprobs(hidden, weight, torch.arange(tokens))[0].sum().backward()
    return memory("VmHWM") - before
run(32, 2048)  # libraries load their code at first use
print(run({tokens}, 129280))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("function", "dtype", "tokens"),
    [
        ("loss", "float32", 1024),
        pytest.param("loss", "float32", 4096, marks=pytest.mark.slow),
        pytest.param("loss", "bfloat16", 1024, marks=pytest.mark.slow),
        ("logprobs", "float32", 1024),
    ],
)
def test_peak_memory_at_v3_vocabulary(function, dtype, tokens):
    if dtype == "bfloat16" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("without AVX2 these products of PyTorch take minutes")
    # Logits and their softmax would be 1.1 GB (1024 tokens) or 4.2 GB. Width 16 keeps the test short; at 256 the
    # weight's own gradient takes 100 MB more, so this bound is 600 MB there.
    code = PEAK.replace("{function}", function).replace("{dtype}", dtype).replace("{tokens}", str(tokens))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 500  # MB above weights and hidden states
