"""From logits to the next token. n rows, V vocabulary."""

from dataclasses import dataclass

from torch import Tensor

from rorqual.errors import UserError
from rorqual.kernels.draw import draw, first_above


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. temperature 0 is greedy; top_k 0 and top_p 1 leave nothing out.

    `thinking_budget`: after that many tokens without `</think>` the engine closes the thinking itself.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    n: int = 1
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        for name, ok, remedy in (
            ("temperature", self.temperature >= 0, "must be ≥ 0"),
            ("top_p", 0 < self.top_p <= 1, "must be in (0, 1]"),
            ("top_k", self.top_k >= 0, "must be ≥ 0"),
            ("max_tokens", self.max_tokens >= 1, "must be at least 1"),
            ("n", self.n >= 1, "must be at least 1"),
            ("thinking_budget", self.thinking_budget is None or self.thinking_budget >= 0, "must be ≥ 0"),
        ):
            if not ok:
                raise UserError(f"{name} = {getattr(self, name)}: {remedy}")


def sample(logits: Tensor, params: SamplingParams, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, V], uniform [n] in [0, 1) → tokens [n], their log-probabilities [n].

    Log-probabilities are of the distribution at this temperature (1 when greedy) before top-k and top-p cut it.
    Drawing by one uniform number a row through the cumulative sum makes a row's token independent of its neighbours.
    """
    if params.temperature == 0:
        logits = logits.float()
        tokens = logits.argmax(-1)
        return tokens, (logits.gather(1, tokens[:, None]) - logits.logsumexp(-1, keepdim=True)).squeeze(1)
    if params.top_p == 1 and params.top_k == 0:
        return draw(logits, params.temperature, uniform)
    probs = (logits.float() / params.temperature).softmax(-1)
    tokens = first_above(_cut(probs, params), uniform)
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()


def _cut(probs: Tensor, params: SamplingParams) -> Tensor:
    """Zero what top-k and top-p leave out; a token stays when those before it hold less than top_p."""
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    drop = ordered.cumsum(-1) - ordered >= params.top_p
    if params.top_k:
        drop[:, params.top_k :] = True
    return probs.scatter(1, index, ordered.masked_fill(drop, 0.0))
