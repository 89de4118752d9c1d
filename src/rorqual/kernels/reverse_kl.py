"""Reverse KL divergence of two linear heads' distributions over the vocabulary, a chunk of tokens at a time.

For p = softmax(h·Wᵀ/T) of the student and q of the teacher: KL(p‖q) = Σ_v p_v (log p_v − log q_v), and its derivative
by the student's logit v is p_v (log p_v − log q_v − KL)/T. N tokens, vocabulary V, widths D and E.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from rorqual.kernels.allowed_tokens import drop_others_
from rorqual.kernels.cross_entropy import AllowedRows, HeadGradients, logit_chunks
from rorqual.kernels.typed_torch import Context, Function
from rorqual.shapes import Float, Float32


def reverse_kl(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    teacher_hidden: Float[Tensor, "N E"],
    teacher_weight: Float[Tensor, "V E"],
    temperature: float = 1.0,
    allowed: AllowedRows | None = None,
) -> Float32[Tensor, " N"]:
    """KL(p‖q) of each token in nats, differentiable by `hidden` and `weight`; the backward pass computes logits again.

    allowed: as in `token_logprobs`, for both distributions.
    """
    return _ReverseKL.apply(hidden, weight, teacher_hidden, teacher_weight, temperature, allowed)


def reverse_kl_reference(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    teacher_hidden: Float[Tensor, "N E"],
    teacher_weight: Float[Tensor, "V E"],
    temperature: float = 1.0,
) -> Float32[Tensor, " N"]:
    """`reverse_kl` as the equation is written, with all logits in memory."""
    logp = log_softmax((hidden @ weight.T).float() / temperature, dim=-1)
    logq = log_softmax((teacher_hidden @ teacher_weight.T).float() / temperature, dim=-1)
    return (logp.exp() * (logp - logq)).sum(-1)


class _KLContext(Context):
    temperature: float
    allowed: AllowedRows | None


class _ReverseKL(Function):
    @staticmethod
    def forward(
        ctx: _KLContext,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        temperature: float,
        allowed: AllowedRows | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight)
        ctx.temperature, ctx.allowed = temperature, allowed
        found = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        every = torch.arange(len(hidden), device=hidden.device)
        for rows, _, _, p, difference in _distributions(every, ctx, hidden, weight, teacher_hidden, teacher_weight):
            found[rows] = (p * difference).sum(-1)
        return found

    @staticmethod
    def backward(ctx: _KLContext, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden, weight, *teacher = ctx.saved_tensors
        gradients = HeadGradients(hidden, weight)
        some = grad.nonzero()[:, 0]
        for rows, inputs, logits, p, difference in _distributions(some, ctx, hidden, weight, *teacher):
            kl = (p * difference).sum(-1, keepdim=True)
            slope = p * (difference - kl) * (grad[rows, None] / ctx.temperature)
            gradients.add(logits.copy_(slope), rows, inputs)
        return *gradients.scaled(None), None, None, None, None


def _distributions(
    rows: Tensor, ctx: _KLContext, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Of the tokens `rows`, in chunks: the chunk's tokens [n], the head's inputs, memory of logits, p and log p − log q
    [n, V].
    """
    chunks = logit_chunks(rows, hidden, weight)
    for chunk, inputs, logits in chunks:
        teacher_logits = teacher_hidden[chunk].to(teacher_weight.dtype) @ teacher_weight.T
        if ctx.allowed is not None:
            allowed = ctx.allowed(chunk)
            drop_others_(logits, allowed, ctx.temperature)
            drop_others_(teacher_logits, allowed, ctx.temperature)
        logp = log_softmax(logits.float() / ctx.temperature, dim=-1)
        logq = log_softmax(teacher_logits.float() / ctx.temperature, dim=-1)
        yield chunk, inputs, logits, logp.exp(), logp - logq
