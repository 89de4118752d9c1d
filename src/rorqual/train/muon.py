"""Muon: momentum orthogonalised by Newton–Schulz, for the matrices of hidden layers.

M ← μM + G;  O = NS(G + μM) (Nesterov);  W ← (1 − ηλ)W − η · 0.2·√max(rows, cols) · O.
The scale gives the update the RMS of an AdamW update, so that both share learning rate and weight decay
(Moonlight, arXiv 2502.16982 §2.2; Kimi K2, 2507.20534 §2.1). Newton–Schulz with the quintic coefficients of
K. Jordan, "Muon" (2024).
"""

import torch
from torch import Tensor

from rorqual.kernels.dtypes import fastest_dtype

# torch._foreach_*: no public names exist, and the type stubs do not export these.
QUINTIC = (3.4445, -4.7750, 2.0315)
RMS = 0.2  # of an AdamW update


def orthogonalise(matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Approximate UVᵀ of each matrix UΣVᵀ in [N, rows, cols]: singular values of about 0.7–1.2.

    Computes in BF16, which is accurate enough, where that is faster (2.3x on an EPYC with AVX512-BF16).
    """
    a, b, c = QUINTIC
    x = matrices.to(dtype or fastest_dtype(matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def as_matrices(name: str, tensor: Tensor) -> Tensor:
    """A view [N, rows, cols] of a parameter's matrices: stacked experts, gate and up are separate matrices."""
    if name.endswith("gate_up_proj"):
        experts, rows, cols = tensor.shape
        return tensor.view(2 * experts, rows // 2, cols)
    return tensor.view(-1, *tensor.shape[-2:])


class Muon:
    """Muon over `masters` (name → FP32 matrix or stack of matrices), which it updates in place.

    The momentum is kept in `dtype` and computed in FP32.
    """

    def __init__(
        self,
        masters: dict[str, Tensor],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.masters, self.lr, self.weight_decay, self.mu, self.dtype = masters, lr, weight_decay, momentum, dtype
        self.momentum = {name: torch.zeros_like(w, dtype=dtype) for name, w in masters.items()}

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], factor: float) -> None:
        """Update each matrix that has a gradient, with learning rate lr · factor."""
        names = [name for name in self.masters if name in grads]
        if not names:
            return
        lr = self.lr * factor
        kept = [self.momentum[name] for name in names]
        momentum = [m.float() for m in kept]  # themselves where they are FP32
        gradient = [grads[name] for name in names]
        torch._foreach_mul_(momentum, self.mu)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(momentum, gradient)  # pyright: ignore[reportPrivateImportUsage]
        if self.dtype is not torch.float32:
            torch._foreach_copy_(kept, momentum)  # pyright: ignore[reportPrivateImportUsage]
        nesterov = torch._foreach_add(gradient, momentum, alpha=self.mu)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_([self.masters[name] for name in names], 1 - lr * self.weight_decay)  # pyright: ignore[reportPrivateImportUsage]
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}  # same shape up to transposition
        for name, update in zip(names, nesterov, strict=True):
            update, weight = as_matrices(name, update), as_matrices(name, self.masters[name])
            if update.shape[-2] > update.shape[-1]:
                update, weight = update.mT, weight.mT
            by_shape.setdefault((update.shape[-2], update.shape[-1]), []).append((update, weight))
        for (_, longest), pairs in by_shape.items():
            updates = orthogonalise(torch.cat([update for update, _ in pairs]))
            parts = updates.split([len(update) for update, _ in pairs])
            for part, (_, weight) in zip(parts, pairs, strict=True):
                weight.add_(part, alpha=-lr * RMS * longest**0.5)
