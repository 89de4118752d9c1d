"""A word a row from a distribution, by one uniform number a row. n rows, V words."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.kernels import cpu


@dataclass(frozen=True)
class SamplingFilter:
    """Temperature, and which words may be drawn at it: the `top_k` most probable (0: all); of these the most probable
    until their shares add up to `top_p` (Holtzman et al. 2020); none below `min_p` times the largest share.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@torch.no_grad()
def sample(logits: Tensor, cut: SamplingFilter, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, V], uniform [n] in [0, 1) → words [n] of what the cut leaves of softmax(logits/temperature), their
    log-probabilities [n] before it.

    A row's word is the first whose probability, added to those before it, exceeds the row's number: it does not
    depend on the other rows. At temperature 0 it is the most probable one, and log-probabilities
    are those of softmax(logits).
    """
    if not cpu.usable(logits):
        return sample_reference(logits, cut, uniform)
    words = logits.new_empty(len(logits), dtype=torch.long)
    logprobs = logits.new_empty(len(logits), dtype=torch.float32)
    arguments = (*logits.shape, cut.temperature, cut.top_p, cut.top_k, cut.min_p, uniform.float().contiguous())
    cpu.call("sample", logits.dtype, logits.contiguous(), *arguments, words, logprobs)
    return words, logprobs


def sample_reference(logits: Tensor, cut: SamplingFilter, uniform: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    probs = _below(logits, cut.temperature).softmax(-1)
    words = first_above(_left(probs, cut), uniform) if cut.temperature else logits.argmax(-1)
    return words, probs.gather(1, words[:, None]).squeeze(1).log()


def scaled_logprobs(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits/temperature) [..., V]; at temperature 0 that of softmax(logits)."""
    return _below(logits, temperature).log_softmax(-1)


def _below(logits: Tensor, temperature: float) -> Tensor:
    # Below 0 before the division, of which the smallest temperatures make no numbers otherwise.
    return (logits - logits.amax(-1, keepdim=True)) / (max(temperature, 1e-30) if temperature else 1.0)


def _left(probs: Tensor, cut: SamplingFilter) -> Tensor:
    """Zero what the cut leaves out; under top_p a word stays when those before it hold less than top_p."""
    if cut.top_p == 1 and cut.top_k == 0:
        return probs.masked_fill(probs < cut.min_p * probs.amax(-1, keepdim=True), 0.0) if cut.min_p else probs
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    drop = ordered < cut.min_p * ordered[:, :1]
    if cut.top_p < 1:  # rounded sums of all come to 1 too early
        drop |= ordered.cumsum(-1) - ordered >= cut.top_p
    if cut.top_k:
        drop[:, cut.top_k :] = True
    return probs.scatter(1, index, ordered.masked_fill(drop, 0.0))


def first_above(shares: Tensor, uniform: Tensor) -> Tensor:
    """The first of each row [n, V] whose sum with those before it exceeds uniform [n] times the row's sum."""
    cumulative = shares.cumsum(-1)
    wanted = (uniform.to(cumulative.device) * cumulative[:, -1]).unsqueeze(1)
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp_(max=shares.shape[1] - 1)
