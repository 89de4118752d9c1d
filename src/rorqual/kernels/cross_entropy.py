"""Log-likelihood of targets under a linear head, without materialising all logits.

The logits of N tokens are N·V numbers: 2 GB at V3's vocabulary (129 280) and 4096 tokens in FP32. Here they are
computed a chunk of tokens at a time, so memory does not grow with N·V. Products run in the dtype of the head, softmax
and sums in fp32; compiled, the softmax of a row and its gradient stay in the CPU's cache. Each function has a plain
reference below with the same signature.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from rorqual.kernels import cpu
from rorqual.kernels.accumulate import accumulate
from rorqual.kernels.allowed_tokens import drop_others_
from rorqual.kernels.exact.linear import product
from rorqual.kernels.exact.rows import exact_logprobs
from rorqual.kernels.typed_torch import Context, Function
from rorqual.shapes import Bool, Float, Float32, Int

AllowedRows = Callable[[Int[Tensor, " n"]], Bool[Tensor, "n V"]]
CHUNK_BYTES = 64 << 20  # of logits in memory
CHUNK_ROWS = 1024  # on a CPU: more make the product no faster, but evict a small vocabulary's logits from the cache


def linear_cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    token_weights: Float[Tensor, " N"],
) -> Float32[Tensor, ""]:
    """Σ wᵢ·(−log p(targetᵢ)) in nats, with gradients for `hidden` and `weight`; the weights wᵢ are constants.

    Tokens of weight 0 are skipped, whatever their target. The gradients are computed in the forward pass, with the
    logits.
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, needs_grad)


def token_logprobs(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    temperature: float = 1.0,
    known_grad: Float[Tensor, " N"] | None = None,
    allowed: AllowedRows | None = None,
    exact: bool = False,
) -> tuple[Float32[Tensor, " N"], Float32[Tensor, " N"]]:
    """log p(targetᵢ) and the entropy of each prediction in nats, at a sampling temperature.

    allowed: from indices [n] of the N tokens to the vocabulary's tokens [n, V] that are left to each; targets are among
    them, and the others have probability 0 (top-k, top-p and min-p).

    The first is differentiable: the backward pass recomputes logits chunk by chunk, unless `known_grad`, the gradient
    that it will get, is given. The entropy is detached. exact: logits and log-probabilities by kernels/exact/, in FP32
    on a CPU.

    The backward pass raises RuntimeError if it gets another gradient than `known_grad`.
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _TokenLogprobs.apply(
        hidden, weight, targets, temperature, known_grad if needs_grad else None, allowed, exact
    )


def linear_cross_entropy_reference(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    token_weights: Float[Tensor, " N"],
) -> Float32[Tensor, ""]:
    """`linear_cross_entropy` as the equation is written, with all logits in memory."""
    logp = log_softmax((hidden @ weight.T).float(), dim=-1)
    kept = token_weights != 0
    nll = -logp.gather(1, targets.where(kept, 0)[:, None])[:, 0]
    return (nll * token_weights).where(kept, 0.0).sum()


def token_logprobs_reference(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    temperature: float = 1.0,
    allowed: Bool[Tensor, "N V"] | None = None,
) -> tuple[Float32[Tensor, " N"], Float32[Tensor, " N"]]:
    """`token_logprobs` as the equation is written, with all logits in memory."""
    logits = (hidden @ weight.T).float() / temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -1e30)
    logp = log_softmax(logits, dim=-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1).detach()


def softmax_grad_(
    logits: Float[Tensor, "n V"],
    targets: Int[Tensor, " n"],
    share: Float[Tensor, " n"] | None,
    temperature: float = 1.0,
) -> tuple[Float32[Tensor, " n"], Float32[Tensor, " n"]]:
    """log p(targetᵢ) and the entropy of softmax(logits/temperature).

    With `share`, logits become shareᵢ·(p − onehot(targetᵢ)) in place. Raises IndexError for a target beyond V.
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
    logits: Float[Tensor, "n V"],
    targets: Int[Tensor, " n"],
    share: Float[Tensor, " n"] | None,
    temperature: float = 1.0,
) -> tuple[Float32[Tensor, " n"], Float32[Tensor, " n"]]:
    logp = log_softmax(logits.float() / temperature, dim=-1)
    found = logp.gather(1, targets[:, None])[:, 0]
    p = logp.exp()
    entropy = -torch.einsum("nv,nv->n", p, logp)
    if share is not None:
        p.scatter_add_(1, targets[:, None], p.new_full((1, 1), -1.0).expand(len(p), 1))
        logits.copy_(p.mul_(share[:, None]))
    return found, entropy


class GradientsContext(Context):
    gradients: "HeadGradients | None"
    temperature: float
    allowed: AllowedRows | None


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: GradientsContext,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        needs_grad: bool,
    ) -> Tensor:
        gradients = HeadGradients(hidden, weight) if needs_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows, inputs, logits in logit_chunks(token_weights.nonzero()[:, 0], hidden, weight):
            share = token_weights[rows].float()
            logp, _ = softmax_grad_(logits, targets[rows], share if needs_grad else None)
            loss -= logp @ share
            if gradients is not None:
                gradients.add(logits, rows, inputs)
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx: GradientsContext, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: backward ran already; call the function again for a second pass")
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients.scaled(grad), None, None, None


class _TokenLogprobs(Function):
    @staticmethod
    def forward(
        ctx: GradientsContext,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        known_grad: Tensor | None,
        allowed: AllowedRows | None,
        exact: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        ctx.gradients = None if known_grad is None else HeadGradients(hidden, weight)
        every = torch.arange(len(hidden), device=hidden.device)
        for rows, inputs, logits in logit_chunks(every, hidden, weight, exact):
            share = None if known_grad is None else known_grad[rows] / -temperature
            if allowed is not None:
                drop_others_(logits, allowed(rows), temperature)
            found = exact_logprobs(logits, targets[rows], torch.full((len(rows),), temperature)) if exact else None
            logprobs[rows], entropy[rows] = softmax_grad_(logits, targets[rows], share, temperature)
            if found is not None:
                logprobs[rows] = found
            if ctx.gradients is not None:
                ctx.gradients.add(logits, rows, inputs)
        ctx.save_for_backward(hidden, weight, targets, *([] if known_grad is None else [known_grad]))
        ctx.temperature, ctx.allowed = temperature, allowed
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: GradientsContext, grad: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        hidden, weight, targets, *known = ctx.saved_tensors
        if known:
            (known_grad,) = known
            if ctx.gradients is None:
                raise RuntimeError("token_logprobs: backward ran already; call the function again for a second pass")
            # False for NaN, which must propagate.
            if (grad - known_grad).square().sum() > 1e-8 * known_grad.square().sum():
                raise RuntimeError("token_logprobs: the gradient differs from known_grad")
            gradients, ctx.gradients = ctx.gradients, None
            return *gradients.scaled(None if grad.isfinite().all() else grad.sum()), None, None, None, None, None
        gradients = HeadGradients(hidden, weight)
        for rows, inputs, logits in logit_chunks(grad.nonzero()[:, 0], hidden, weight):
            if ctx.allowed is not None:
                drop_others_(logits, ctx.allowed(rows), ctx.temperature)
            softmax_grad_(logits, targets[rows], grad[rows] / -ctx.temperature, ctx.temperature)
            gradients.add(logits, rows, inputs)
        return *gradients.scaled(None), None, None, None, None, None


class HeadGradients:
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
        for grad in (self.hidden, self.weight):
            if grad is not None and factor is not None:
                grad.mul_(factor)
        if self.weight is not None and self.product is not None:
            return self.hidden, self.product.copy_(self.weight)
        return self.hidden, self.weight


def logit_chunks(
    rows: Tensor, hidden: Tensor, weight: Tensor, exact: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The tokens `rows` in chunks [n], the head's inputs [n, D] and the logits [n, V], which the next chunk overwrites.

    Logits in new memory would cost a page fault for each page, more than the product itself.
    """
    most = CHUNK_ROWS if weight.is_cpu else len(rows)
    size = max(1, min(most, CHUNK_BYTES // (weight.itemsize * len(weight)), len(rows)))
    logits = torch.empty(size, len(weight), dtype=weight.dtype, device=weight.device)
    for chunk in torch.split(rows, size):
        if len(chunk):
            inputs = hidden[chunk].to(weight.dtype)
            here = logits[: len(chunk)]
            yield chunk, inputs, product(inputs, weight, out=here) if exact else torch.mm(inputs, weight.T, out=here)
