"""From logits to the next token. n rows, V vocabulary."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rorqual.engine.grammar import Grammar
from rorqual.errors import UserError
from rorqual.kernels.draw import draw, first_above


@dataclass(frozen=True)
class Cut:
    """Temperature, and what of the vocabulary may be drawn at it."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave nothing out.

    `min_p`: leave out what is less probable than this share of the most probable token. `repetition_penalty` divides
    the logits above 0 of tokens that the prompt or the answer holds, and multiplies those below (Keskar et al. 2019);
    `presence_penalty` and `frequency_penalty` are taken off the logits of the answer's tokens, once and as often as
    they occur; `logit_bias` adds to single tokens' logits. `stop` ends the answer before one of these
    strings, wherever they stand after the thinking.
    `grammar`: the form that the answer, not the thinking before it, must have.
    `thinking_budget`: after that many tokens without `</think>` the engine closes the thinking itself. `logprobs`: how
    many of the most probable tokens to report at every place. `ignore_eos`: the end token does not end the answer.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = field(default=())
    max_tokens: int = 256
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    thinking_budget: int | None = None
    grammar: Grammar | None = None
    logprobs: int = 0

    def __post_init__(self) -> None:
        for name, ok, remedy in (
            ("temperature", 0 <= self.temperature < float("inf"), "must be ≥ 0"),
            ("top_p", 0 < self.top_p <= 1, "must be in (0, 1]"),
            ("top_k", self.top_k >= 0, "must be ≥ 0"),
            ("min_p", 0 <= self.min_p < 1, "must be in [0, 1)"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "must be above 0"),
            ("presence_penalty", abs(self.presence_penalty) < float("inf"), "must be a number"),
            ("frequency_penalty", abs(self.frequency_penalty) < float("inf"), "must be a number"),
            ("logit_bias", all(abs(b) < float("inf") for _, b in self.logit_bias), "must be numbers"),
            ("max_tokens", self.max_tokens >= 1, "must be at least 1"),
            ("n", self.n >= 1, "must be at least 1"),
            ("stop", all(self.stop), "must not be empty"),
            ("thinking_budget", self.thinking_budget is None or self.thinking_budget >= 0, "must be ≥ 0"),
            ("logprobs", self.logprobs >= 0, "must be ≥ 0"),
        ):
            if not ok:
                raise UserError(f"{name} = {getattr(self, name)}: {remedy}")

    @property
    def cut(self) -> Cut:
        return Cut(self.temperature, self.top_p, self.top_k, self.min_p)

    @property
    def adjusts(self) -> bool:
        """Whether the logits depend on what came before or on single tokens' biases."""
        plain = self.repetition_penalty == 1 and self.presence_penalty == self.frequency_penalty == 0
        return not plain or bool(self.logit_bias)


def sample(logits: Tensor, cut: Cut, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, V], uniform [n] in [0, 1) → tokens [n], their log-probabilities [n].

    Log-probabilities are of the distribution at this temperature (1 when greedy) before the cut. Drawing by one uniform
    number a row through the cumulative sum makes a row's token independent of its neighbours.
    """
    if cut.temperature == 0 or (cut.top_p == 1 and cut.top_k == 0 and cut.min_p == 0):
        return draw(logits, cut.temperature, uniform)
    probs = (logits.float() / cut.temperature).softmax(-1)
    tokens = first_above(_kept(probs, cut), uniform)
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()


def _kept(probs: Tensor, cut: Cut) -> Tensor:
    """Zero what the cut leaves out; under top-p a token stays when those before it hold less than top_p."""
    if cut.top_p == 1 and cut.top_k == 0:
        return probs.masked_fill(probs < cut.min_p * probs.amax(-1, keepdim=True), 0.0)
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    drop = (ordered.cumsum(-1) - ordered >= cut.top_p) | (ordered < cut.min_p * ordered[:, :1])
    if cut.top_k:
        drop[:, cut.top_k :] = True
    return probs.scatter(1, index, ordered.masked_fill(drop, 0.0))


def adjust(logits: Tensor, params: SamplingParams, prompt: Tensor, made: Tensor) -> Tensor:
    """One row's logits [V] → those with penalties for the tokens of prompt and answer, and biases."""
    logits = logits.float()
    if params.repetition_penalty != 1:
        seen = torch.cat([prompt, made]).unique().to(logits.device)
        old = logits[seen]
        p = params.repetition_penalty
        logits = logits.index_put((seen,), torch.where(old > 0, old / p, old * p))
    if params.presence_penalty or params.frequency_penalty:
        tokens, counts = made.to(logits.device).unique(return_counts=True)
        logits = logits.index_add(0, tokens, -params.presence_penalty - params.frequency_penalty * counts)
    for token, bias in params.logit_bias:
        logits = logits.index_add(0, torch.tensor([token], device=logits.device), logits.new_tensor([bias]))
    return logits
