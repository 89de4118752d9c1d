"""GPTQ (Frantar et al. 2023, 2210.17323, §3, algorithm 1): round a column at a time, and correct the others for it.

With H = XᵀX of the inputs, the error ‖X(W − Q)ᵀ‖² that a rounded column leaves is least where the columns not yet
rounded change by −e/[H⁻¹]ᵢᵢ · [H⁻¹]ᵢ,: of the H of those left. The rows of a Cholesky factor of H⁻¹ are these vectors.
Columns go in order of falling ‖X:,i‖ ("act-order"), with the scales of the original groups, which no reader of the
packed layout has to know.
"""

import torch
from torch import Tensor

from rorqual.precision.integer_rounding import per_input, round_nearest, to_grid
from rorqual.precision.quantize import Bits
from rorqual.shapes import Float32, UInt8

DAMPING = 0.01  # of the mean of H's diagonal, added to it
BLOCK = 128  # columns that are corrected at once; the others after every block


def gptq(
    weight: Float32[Tensor, "N K"], gram: Float32[Tensor, "K K"], bits: Bits
) -> tuple[UInt8[Tensor, "N K"], Float32[Tensor, "N groups"]]:
    """weight and XᵀX of its inputs → q and scales, as `round_nearest` gives them."""
    q, scales = round_nearest(weight, bits)
    if not gram.any():
        return q, scales
    order = gram.diagonal().argsort(descending=True)
    W, scale, U = weight[:, order], per_input(scales, weight.shape[1])[:, order], _inverse_factor(gram, order)
    K = len(order)
    for first in range(0, K, BLOCK):
        last = min(first + BLOCK, K)
        errors = W.new_empty(len(W), last - first)
        for i in range(first, last):
            number, value = to_grid(W[:, i], scale[:, i], bits)
            q[:, order[i]] = number
            errors[:, i - first] = error = (W[:, i] - value) / U[i, i]
            W[:, i + 1 : last].addr_(error, U[i, i + 1 : last], alpha=-1)
        W[:, last:].addmm_(errors, U[first:last, last:], alpha=-1)
    return q, scales


def _inverse_factor(gram: Float32[Tensor, "K K"], order: Tensor) -> Float32[Tensor, "K K"]:
    """The upper Cholesky factor U of the damped inverse, H⁻¹ = UᵀU."""
    H = gram[order][:, order].double()
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).float()
