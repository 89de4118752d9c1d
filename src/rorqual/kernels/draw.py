"""A word a row from a distribution, by one uniform number a row. n rows, V words."""

import torch
from torch import Tensor

from rorqual.kernels import cpu


@torch.no_grad()
def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, V], uniform [n] in [0, 1) → words [n] of softmax(logits/temperature), their log-probabilities [n].

    A row's word is the first whose probability, added to those before it, exceeds the row's number: it does not
    depend on the other rows. At temperature 0 it is the most probable one, and log-probabilities
    are those of softmax(logits).
    """
    if not cpu.usable(logits):
        return draw_reference(logits, temperature, uniform)
    words = logits.new_empty(len(logits), dtype=torch.long)
    logprobs = logits.new_empty(len(logits), dtype=torch.float32)
    arguments = (*logits.shape, temperature, uniform.float().contiguous(), words, logprobs)
    cpu.call("draw", logits.dtype, logits.contiguous(), *arguments)
    return words, logprobs


def draw_reference(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    probs = (logits.float() / (temperature or 1.0)).softmax(-1)
    words = first_above(probs, uniform) if temperature else logits.argmax(-1)
    return words, probs.gather(1, words[:, None]).squeeze(1).log()


def first_above(shares: Tensor, uniform: Tensor) -> Tensor:
    """The first of each row [n, V] whose sum with those before it exceeds uniform [n] times the row's sum."""
    cumulative = shares.cumsum(-1)
    wanted = (uniform.to(cumulative.device) * cumulative[:, -1]).unsqueeze(1)
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp_(max=shares.shape[1] - 1)
