"""Log-likelihood of targets under a linear head, without materialising all logits.

The logits of N tokens are N·V numbers: 2 GB at V3's vocabulary (129 280) and 4096 tokens in FP32. Here they are
computed a chunk of tokens at a time, so memory does not grow with N·V. Products run in the dtype of the head, softmax
and sums in fp32; compiled, the softmax of a row and its gradient stay in the CPU's cache. Each function has a plain
reference below with the same signature.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from rorqual.kernels import cpu
from rorqual.kernels.accumulate import accumulate

CHUNK_BYTES = 64 << 20  # of logits in memory
CHUNK_ROWS = 1024  # more rows make the product no faster, but evict a small vocabulary's logits from the CPU's cache


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    """Σ wᵢ·(−log p(targetᵢ)) in nats, an fp32 scalar with gradients for `hidden` and `weight`.

    hidden [N, D], weight [V, D], targets [N] int64, token_weights [N] (constants). Tokens of weight 0 are
    skipped, whatever their target. The gradients are computed in the forward pass, with the logits.
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, needs_grad)


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, known_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log p(targetᵢ) and the entropy of each prediction in nats, at a sampling temperature; both fp32 [N].

    hidden [N, D], weight [V, D], targets [N] int64. The first is differentiable: the backward pass recomputes logits
    chunk by chunk, unless `known_grad` [N], the gradient that it will get, is given. The entropy is detached.

    The backward pass raises RuntimeError if it gets another gradient than `known_grad`.
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, known_grad if needs_grad else None)


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    """`linear_cross_entropy` as the equation is written, with all logits in memory."""
    logp = log_softmax((hidden @ weight.T).float(), dim=-1)
    kept = token_weights != 0
    nll = -logp.gather(1, targets.where(kept, 0)[:, None])[:, 0]
    return (nll * token_weights).where(kept, 0.0).sum()


def token_logprobs_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` as the equation is written, with all logits in memory."""
    logp = log_softmax((hidden @ weight.T).float() / temperature, dim=-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1).detach()


def softmax_grad_(
    logits: Tensor, targets: Tensor, share: Tensor | None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log p(targetᵢ) and the entropy of softmax(logits/temperature), both fp32 [n], of logits [n, V].

    With `share` [n], logits become shareᵢ·(p − onehot(targetᵢ)) in place. Raises IndexError for a target beyond V.
    """
    # On an accelerator the check would synchronise, and it would break a compiled graph; there gather refuses targets.
    check = logits.is_cpu and len(targets) and not torch.compiler.is_compiling()
    if check and not (targets.min() >= 0 and targets.max() < logits.shape[1]):
        raise IndexError(f"a target is outside the vocabulary of {logits.shape[1]} tokens")
    if not cpu.usable(logits) or not logits.is_contiguous():
        return softmax_grad_reference_(logits, targets, share, temperature)
    logprob, entropy = logits.new_empty(2, len(logits), dtype=torch.float32)
    share = None if share is None else share.float().contiguous()
    arguments = (*logits.shape, targets.long().contiguous(), share, temperature, logprob, entropy)
    cpu.call("softmax_grad", logits.dtype, logits, *arguments)
    return logprob, entropy


def softmax_grad_reference_(
    logits: Tensor, targets: Tensor, share: Tensor | None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    logp = log_softmax(logits.float() / temperature, dim=-1)
    found = logp.gather(1, targets[:, None])[:, 0]
    p = logp.exp()
    entropy = -torch.linalg.vecdot(p, logp)
    if share is not None:
        p.scatter_add_(1, targets[:, None], p.new_full((1, 1), -1.0).expand(len(p), 1))
        logits.copy_(p.mul_(share[:, None]))
    return found, entropy


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights, needs_grad):
        gradients = _Gradients(hidden, weight) if needs_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows, inputs, logits in _chunks(token_weights.nonzero()[:, 0], hidden, weight):
            share = token_weights[rows].float()
            logp, _ = softmax_grad_(logits, targets[rows], share if needs_grad else None)
            loss -= logp @ share
            if gradients is not None:
                gradients.add(logits, rows, inputs)
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx, grad):
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: backward ran already; call the function again for a second pass")
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients.scaled(grad), None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, known_grad):
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        ctx.gradients = None if known_grad is None else _Gradients(hidden, weight)
        for rows, inputs, logits in _chunks(torch.arange(len(hidden), device=hidden.device), hidden, weight):
            share = None if known_grad is None else known_grad[rows] / -temperature
            logprobs[rows], entropy[rows] = softmax_grad_(logits, targets[rows], share, temperature)
            if ctx.gradients is not None:
                ctx.gradients.add(logits, rows, inputs)
        ctx.save_for_backward(hidden, weight, targets, known_grad)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, known_grad = ctx.saved_tensors
        if known_grad is not None:
            if ctx.gradients is None:
                raise RuntimeError("token_logprobs: backward ran already; call the function again for a second pass")
            if (grad - known_grad).norm() > 1e-4 * known_grad.norm():  # false for NaN, which must propagate
                raise RuntimeError("token_logprobs: the gradient differs from known_grad")
            gradients, ctx.gradients = ctx.gradients, None
            return *gradients.scaled(None if grad.isfinite().all() else grad.sum()), None, None, None
        gradients = _Gradients(hidden, weight)
        for rows, inputs, logits in _chunks(grad.nonzero()[:, 0], hidden, weight):
            softmax_grad_(logits, targets[rows], grad[rows] / -ctx.temperature, ctx.temperature)
            gradients.add(logits, rows, inputs)
        return *gradients.scaled(None), None, None, None


class _Gradients:
    """Gradients of `hidden` (in its dtype) and `weight` (summed over chunks in fp32), where required."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        self.matrix = weight
        self.hidden = torch.zeros_like(hidden) if hidden.requires_grad else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        self.product = torch.empty_like(weight) if weight.requires_grad and weight.dtype != torch.float32 else None

    def add(self, grad_logits: Tensor, rows: Tensor, inputs: Tensor) -> None:
        """Add the contribution of the tokens `rows` [n]: ∂loss/∂logits [n, V] and the head's inputs [n, D]."""
        if self.hidden is not None:
            self.hidden[rows] = (grad_logits @ self.matrix).to(self.hidden.dtype)
        if self.weight is None:
            return
        if self.product is None:
            self.weight.addmm_(grad_logits.T, inputs)
        else:
            accumulate(self.weight, torch.mm(grad_logits.T, inputs, out=self.product))

    def scaled(self, factor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        found = (self.hidden, self.weight)
        if factor is not None:
            found = tuple(None if g is None else g.mul_(factor) for g in found)
        if self.product is not None:
            return found[0], self.product.copy_(found[1])
        return found


def _chunks(rows: Tensor, hidden: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The tokens `rows` in chunks [n], the head's inputs [n, D] and the logits [n, V], which the next chunk overwrites.

    Logits in new memory would cost a page fault for each page, more than the product itself.
    """
    size = max(1, min(CHUNK_ROWS, CHUNK_BYTES // (weight.itemsize * len(weight)), len(rows)))
    logits = torch.empty(size, len(weight), dtype=weight.dtype, device=weight.device)
    for chunk in rows.split(size):
        if len(chunk):
            inputs = hidden[chunk].to(weight.dtype)
            yield chunk, inputs, torch.mm(inputs, weight.T, out=logits[: len(chunk)])
