"""softmax(q·kᵀ·scale)·v. B batch, H heads, G key/value heads (H is a multiple), T queries, S keys, D, V widths."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.kernels.typed_torch import Context, Function, once_differentiable
from rorqual.shapes import Bool, Float

MAX_PLAIN_KEYS = 512  # up to which plain products are faster than torch's fused kernel
WIDTHS = 16  # of which widths are multiples in cpu/csrc/masked_attention.cpp
CHUNK_BYTES = 2 << 20  # of attention weights at a time, which stay in the CPU's cache


Mask = Bool[Tensor, "#B 1 #T #S"] | tuple[Bool[Tensor, "_ 1 _ _"], ...] | None


def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    mask: Mask,
    causal: bool,
    scale: float,
) -> Float[Tensor, "B H T V"]:
    """A mask is true where a query attends.

    Several masks [n, 1, t, t], with B = 1, are document masks: packed sequences, the first n of t tokens each, that
    attend to themselves only. Raises ValueError if they do not cover T.

    In BF16 on a CPU torch's fused kernel is slower than plain products (at T = 256 by 1.3 times forward, 2 times with
    the backward pass), so training on short sequences uses those. In FP32 a compiled kernel leaves out what masks hide.
    """
    if isinstance(mask, tuple) and (len(q) > 1 or sum(len(m) * m.shape[-1] for m in mask) != q.shape[2]):
        raise ValueError(f"masks of {[tuple(m.shape) for m in mask]} do not cover one row of {q.shape[2]} tokens")
    longest = max(m.shape[-1] for m in mask) if isinstance(mask, tuple) else k.shape[2]
    short = q.device.type == "cpu" and q.dtype == torch.bfloat16 and longest <= MAX_PLAIN_KEYS
    if short and torch.is_grad_enabled() and (mask is not None or causal):
        return _Products.apply(q, k, v, scale, *_masks(q, k, mask))
    if mask is not None and skips_hidden(q.dtype, q.shape[-1], v.shape[-1]) and cpu.usable(q, k, v):
        return _Masked.apply(q, k, v, scale, *_masks(q, k, mask))
    return attention_reference(q, k, v, mask, causal, scale)


def skips_hidden(dtype: torch.dtype, width: int, value_width: int) -> bool:
    """Whether on a CPU `attention` of heads of these widths takes no time for keys that a mask hides."""
    return dtype == torch.float32 and width % WIDTHS == value_width % WIDTHS == 0 and cpu.capability() is not None


def attention_reference(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    mask: Mask,
    causal: bool,
    scale: float,
) -> Float[Tensor, "B H T V"]:
    if isinstance(mask, tuple):
        sizes = [len(m) * m.shape[-1] for m in mask]
        parts = zip(*(torch.split(x, sizes, dim=2) for x in (q, k, v)), strict=True)
        out = [
            attention_reference(_unpack(q_, m), _unpack(k_, m), _unpack(v_, m), m, False, scale)
            for (q_, k_, v_), m in zip(parts, mask, strict=True)
        ]
        return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in out]).transpose(0, 1).unsqueeze(0)
    share = q.shape[1] // k.shape[1]
    if share > 1:
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


def _masks(q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, ...]:
    """One or several masks, each [n or 1, 1, T, S] with contiguous rows."""
    if isinstance(mask, tuple):
        return tuple(m.contiguous() for m in mask)
    if mask is None:
        return (torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool).tril(),)
    mask = mask.expand(-1, 1, q.shape[2], k.shape[2])
    return (mask if mask.stride(-1) == 1 else mask.contiguous(),)


class _ProductsContext(Context):
    scale: float


class _Products(Function):
    """Plain products, a few sequences at a time. The backward pass recomputes the attention weights, B·H·T·S numbers a
    layer: 22 MB for SmolLM2 with 19 rows of 256 tokens, where it took half as long as torch's fused kernel.
    """

    @staticmethod
    def forward(ctx: _ProductsContext, q: Tensor, k: Tensor, v: Tensor, scale: float, *masks: Tensor) -> Tensor:
        out = _empty_heads(v, (*q.shape[:3], v.shape[3]))
        for mask, (q_, k_, v_, out_) in _chunks(masks, q, k, v, out):
            weights, _ = _attention_weights(q_, k_, mask, scale)
            out_.copy_((weights @ v_.contiguous()).view(out_.shape))
        ctx.save_for_backward(q, k, v, *masks)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: _ProductsContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *masks = ctx.saved_tensors
        grads = [_empty_heads(x, x.shape) for x in (q, k, v)]
        for mask, (q_, k_, v_, grad_, grad_q, grad_k, grad_v) in _chunks(masks, q, k, v, grad, *grads):
            weights, queries = _attention_weights(q_, k_, mask, ctx.scale)
            grad_out = grad_.contiguous().view(*queries.shape[:3], -1)
            grad_v.copy_(weights.transpose(2, 3) @ grad_out)
            grad_scores = _softmax_grad(grad_out @ v_.contiguous().transpose(2, 3), weights, ctx.scale)
            grad_q.copy_((grad_scores @ k_.contiguous()).view(grad_q.shape))
            grad_k.copy_(grad_scores.transpose(2, 3) @ queries)
        return *grads, None, *(None for _ in masks)


class _Masked(Function):
    """cpu/csrc/masked_attention.cpp. The backward pass recomputes the attention weights."""

    @staticmethod
    def forward(ctx: _ProductsContext, q: Tensor, k: Tensor, v: Tensor, scale: float, *masks: Tensor) -> Tensor:
        q, k, v = (_by_token(x) for x in (q, k, v))
        out = _empty_heads(q, (*q.shape[:3], v.shape[3]))
        log_sums = q.new_empty(q[..., 0].numel())
        for mask, at, (q_, k_, v_, out_) in _sequences(masks, q, k, v, out):
            cpu.call("masked_attention", q.dtype, *_masked_arguments(q_, k_, v_, mask), scale, out_, log_sums[at:])
        ctx.save_for_backward(q, k, v, out, log_sums, *masks)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: _ProductsContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums, *masks = ctx.saved_tensors
        grad = _by_token(grad)
        # Keys and values have a gradient from each head.
        grads = [_empty_heads(x, (len(x), q.shape[1], *x.shape[2:])) for x in (q, k, v)]
        for mask, at, (q_, k_, v_, out_, grad_, *to) in _sequences(masks, q, k, v, out, grad, *grads):
            arguments = _masked_arguments(q_, k_, v_, mask)
            cpu.call("masked_attention_backward", q.dtype, *arguments, ctx.scale, out_, log_sums[at:], grad_, *to)
        of_q, *of_heads = grads
        share = q.shape[1] // k.shape[1]
        if share > 1:
            of_heads = [torch.unflatten(x, 1, (-1, share)).sum(2) for x in of_heads]
        return of_q, *of_heads, None, *(None for _ in masks)


def _by_token(x: Tensor) -> Tensor:
    """x [B, heads, T, W] in the model's memory layout [B, T, heads, W]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _sequences(masks: Sequence[Tensor], *tensors: Tensor) -> Iterator[tuple[Tensor, int, list[Tensor]]]:
    """Each mask, where its log_sums begin, and its sequences of tensors [B, heads, T, W], as [n, t, heads, W]."""
    if len(masks) == 1 and masks[0].shape[-2] == tensors[0].shape[2]:
        yield masks[0], 0, [x.transpose(1, 2) for x in tensors]
        return
    start = 0
    for mask in masks:
        end = start + len(mask) * mask.shape[-1]
        yield mask, start * tensors[0].shape[1], [_unpack(x[:, :, start:end], mask).transpose(1, 2) for x in tensors]
        start = end


def _masked_arguments(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> list[Tensor | int]:
    n, t, heads, width = q.shape
    by_sequence = mask.stride(0) if len(mask) > 1 else 0
    return [q, k, v, mask, by_sequence, mask.stride(-2), n, t, k.shape[1], heads, k.shape[2], width, v.shape[3]]


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q·kᵀ·scale) [B, G, H/G·T, S] and q [B, G, H/G·T, D]: heads that share keys are stacked as queries.

    Both are contiguous, since a product would copy its factors otherwise.
    """
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    queries = q.contiguous().view(B, G, H // G * T, D)
    scores = queries @ k.contiguous().transpose(2, 3)
    mask = mask.view(-1, T, S)
    if cpu.usable(scores):
        by_row = mask.stride(0) if len(mask) > 1 else 0
        cpu.call("masked_softmax", scores.dtype, scores, B * H * T, S, mask, by_row, mask.stride(1), H * T, T, scale)
        return scores, queries
    scores = scores.mul_(scale).view(B, H, T, S).masked_fill_(~mask.unsqueeze(1), torch.finfo(q.dtype).min)
    return scores.softmax(-1).view(B, G, -1, S), queries


def _softmax_grad(grad: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The gradient of the attention weights [B, G, H/G·T, S] → of the scores before `scale`; may overwrite `grad`."""
    if cpu.usable(grad, weights):
        cpu.call("masked_softmax_backward", grad.dtype, grad, weights, grad[..., 0].numel(), grad.shape[-1], scale)
        return grad
    return torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype).mul_(scale)


def _chunks(masks: Sequence[Tensor], *tensors: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Chunks of sequences of tensors [B, heads, T, W]: a mask, and views of each tensor."""
    start = 0
    for mask in masks:
        here = tensors
        if len(masks) > 1 or len(mask) > len(tensors[0]):
            end = start + len(mask) * mask.shape[-1]
            here, start = tuple(_unpack(x[:, :, start:end], mask) for x in tensors), end
        B, H = here[0].shape[:2]
        size = max(1, CHUNK_BYTES // (H * mask.shape[-2] * mask.shape[-1] * here[0].itemsize))
        if torch.compiler.is_compiling():  # the loop would be unrolled
            size = B
        for first in range(0, B, size):
            some = slice(first, first + size)
            yield mask[some] if len(mask) > 1 else mask, [x[some] for x in here]


def _unpack(x: Tensor, mask: Tensor) -> Tensor:
    """x [1, heads, n·t, W] → [n, heads, t, W], a view, for mask [n, 1, t, t]."""
    return torch.unflatten(x.squeeze(0), 1, (len(mask), -1)).transpose(0, 1)


def _empty_heads(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty [B, H, T, W] in the model's memory layout [B, T, H, W]."""
    batch, heads, tokens, width = shape
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)
