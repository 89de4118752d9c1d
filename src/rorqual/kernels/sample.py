"""Sample one token a row, by one uniform random number a row. n rows, vocabulary V."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.shapes import Float, Float32, Int64


@dataclass(frozen=True)
class SamplingFilter:
    """Temperature, and the tokens to sample from: the `top_k` most probable (0: all); of these the most probable until
    their probabilities add up to `top_p` (Holtzman et al. 2020); none below `min_p` times the largest probability.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@torch.no_grad()
def sample(
    logits: Float[Tensor, "n V"], filter: SamplingFilter, uniform: Float[Tensor, " n"]
) -> tuple[Int64[Tensor, " n"], Float32[Tensor, " n"]]:
    """Tokens from the filtered softmax(logits/temperature), and their log-probabilities before filtering; uniform is in
    [0, 1).

    Inverse transform sampling: a row's token is the first at which the cumulative probability exceeds the row's number,
    so it does not depend on the other rows. At temperature 0 it is the most probable one, and log-probabilities are
    those of softmax(logits).
    """
    if not cpu.usable(logits):
        return sample_reference(logits, filter, uniform)
    tokens = logits.new_empty(len(logits), dtype=torch.long)
    logprobs = logits.new_empty(len(logits), dtype=torch.float32)
    settings = filter.temperature, filter.top_p, filter.top_k, filter.min_p
    uniform = uniform.float().contiguous()
    cpu.call("sample", logits.dtype, logits.contiguous(), *logits.shape, *settings, uniform, tokens, logprobs)
    return tokens, logprobs


def sample_reference(
    logits: Float[Tensor, "n V"], filter: SamplingFilter, uniform: Float[Tensor, " n"]
) -> tuple[Int64[Tensor, " n"], Float32[Tensor, " n"]]:
    logits = logits.float()
    probs = _scaled(logits, filter.temperature).softmax(-1)
    tokens = first_above(_filtered(probs, filter), uniform) if filter.temperature else logits.argmax(-1)
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()


def scaled_logprobs(logits: Float[Tensor, "*batch V"], temperature: float) -> Float[Tensor, "*batch V"]:
    """log softmax(logits/temperature); at temperature 0 that of softmax(logits)."""
    return _scaled(logits, temperature).log_softmax(-1)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    # The maximum is subtracted first: divided by the smallest temperatures, positive logits would overflow.
    return (logits - logits.amax(-1, keepdim=True)) / (max(temperature, 1e-30) if temperature else 1.0)


def _filtered(probs: Tensor, filter: SamplingFilter) -> Tensor:
    """Zero the tokens that the filter drops; top_p keeps a token when those before it sum to less than top_p."""
    if filter.top_p == 1 and filter.top_k == 0:
        return probs.masked_fill(probs < filter.min_p * probs.amax(-1, keepdim=True), 0.0) if filter.min_p else probs
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    drop = ordered < filter.min_p * ordered[:, :1]
    if filter.top_p < 1:  # at 1, rounded sums would reach it too early
        drop |= ordered.cumsum(-1) - ordered >= filter.top_p
    if filter.top_k:
        drop[:, filter.top_k :] = True
    return probs.scatter(1, index, ordered.masked_fill(drop, 0.0))


def first_above(probs: Float[Tensor, "n V"], uniform: Float[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """The first index of each row at which the cumulative sum exceeds `uniform` times the row's sum."""
    cumulative = probs.cumsum(-1)
    threshold = (uniform.to(cumulative.device) * cumulative[:, -1]).unsqueeze(1)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_(max=probs.shape[1] - 1)
