"""Sampling parameters of a request, and the penalties that they apply to its logits."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property

import torch
from torch import Tensor

from rorqual.engine.argument_checks import number
from rorqual.engine.grammar import Grammar
from rorqual.errors import UserError
from rorqual.kernels.sample import SamplingFilter

MAX_LOGIT = 1e30
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
WHOLE = ("top_k", "max_tokens", "max_length", "n", "seed", "thinking_budget", "logprobs")


@dataclass(frozen=True)
class SamplingParams:
    """How to sample a completion. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    `min_p`: drop tokens less probable than this share of the most probable one. `repetition_penalty` divides the
    positive logits of tokens that the prompt or the answer holds, and multiplies the negative ones (Keskar et al.
    2019); `presence_penalty` and `frequency_penalty` are subtracted from the logits of the answer's tokens, once and
    once an occurrence; `logit_bias` adds to single tokens' logits. `stop`: strings that end the answer, excluded from
    it; they are not looked for in the thinking. `grammar`: constrains the answer, not the thinking before it.
    `max_length`: limit of prompt and answer together, tokens. `thinking_budget`: after that many tokens without
    `</think>` the engine inserts it. `logprobs`: how many of the most probable tokens to report at every position.
    `ignore_eos`: the end token does not end the answer. `record_allowed`: keep the set of tokens that top_k, top_p and
    min_p allow at every position (Completion.allowed); log-probabilities then are those among the allowed tokens.

    None means the default; `stop` may be one string, `logit_bias` a dictionary. Raises UserError for invalid values.
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
    max_length: int | None = None
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    thinking_budget: int | None = None
    grammar: Grammar | None = None
    logprobs: int = 0
    record_allowed: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            if (value := getattr(self, f.name)) is None:
                object.__setattr__(self, f.name, f.default)
            elif f.name in NUMBERS or f.name in WHOLE:
                object.__setattr__(self, f.name, number(f.name, value, whole=f.name in WHOLE))
        stop, biases = self.stop, self.logit_bias
        pairs = biases.items() if isinstance(biases, Mapping) else biases
        try:
            object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
            ids = tuple(number("stop_token_ids", t, whole=True) for t in self.stop_token_ids)
            object.__setattr__(self, "stop_token_ids", ids)
            pairs = tuple((number("logit_bias", t, whole=True), float(number("logit_bias", b))) for t, b in pairs)
            object.__setattr__(self, "logit_bias", pairs)
        except (TypeError, ValueError):
            raise UserError(
                "stop must be a string or a list of strings, stop_token_ids a list of token ids, logit_bias a "
                "dictionary of token ids and numbers"
            ) from None
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
            ("max_length", self.max_length is None or self.max_length >= 1, "must be at least 1"),
            ("n", self.n >= 1, "must be at least 1"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "must be non-empty strings"),
            ("stop_token_ids", all(0 <= t < 1 << 31 for t in self.stop_token_ids), "must be token ids"),
            ("thinking_budget", self.thinking_budget is None or self.thinking_budget >= 0, "must be ≥ 0"),
            ("logprobs", self.logprobs >= 0, "must be ≥ 0"),
            ("grammar", self.grammar is None or isinstance(self.grammar, Grammar), "must be a Grammar"),
        ):
            if not ok:
                raise UserError(f"{name} = {getattr(self, name)}: {remedy}")

    @property
    def filter(self) -> SamplingFilter:
        """What is left to the kernels: where allowed tokens are recorded, the others' logits are gone before."""
        return SamplingFilter(self.temperature) if self.record_allowed else self.whole_filter

    @property
    def whole_filter(self) -> SamplingFilter:
        return SamplingFilter(self.temperature, self.top_p, self.top_k, self.min_p)

    @cached_property
    def biases(self) -> tuple[Tensor, Tensor]:
        """The tokens [k] of logit_bias and their biases [k]."""
        tokens, biases = zip(*self.logit_bias, strict=True)
        return torch.tensor(tokens), torch.tensor(biases)

    @property
    def adjusts(self) -> bool:
        """Whether penalties or biases change the logits."""
        plain = self.repetition_penalty == 1 and self.presence_penalty == self.frequency_penalty == 0
        return not plain or bool(self.logit_bias)


def adjust(logits: Tensor, params: SamplingParams, prompt: Tensor, generated: Tensor) -> Tensor:
    """One row's logits [V] → logits with penalties for the tokens of prompt and answer, and biases."""
    logits = logits.float()
    if params.repetition_penalty != 1:
        seen = torch.cat([prompt, generated]).to(logits.device)  # duplicates write the same value
        old = logits[seen]
        p = params.repetition_penalty
        logits = logits.index_put((seen,), torch.where(old > 0, old / p, old * p))
    if params.presence_penalty or params.frequency_penalty:
        counts = torch.bincount(generated.to(logits.device), minlength=len(logits))
        logits = logits - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
    if params.logit_bias:
        tokens, biases = params.biases
        logits = logits.index_add(0, tokens.to(logits.device), biases.to(logits.device))
    return logits.clamp(-MAX_LOGIT, MAX_LOGIT)  # extreme penalties make infinities, and their differences NaN
