"""From logits to the next token. n rows, V vocabulary."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property

import torch
from torch import Tensor

from rorqual.engine.argument_checks import number
from rorqual.engine.grammar import Grammar
from rorqual.errors import UserError
from rorqual.kernels.sample import SamplingFilter

LARGEST = 1e30
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
WHOLE = ("top_k", "max_tokens", "max_length", "n", "seed", "thinking_budget", "logprobs")


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave nothing out.

    `min_p`: leave out what is less probable than this share of the most probable token. `repetition_penalty` divides
    the logits above 0 of tokens that the prompt or the answer holds, and multiplies those below (Keskar et al. 2019);
    `presence_penalty` and `frequency_penalty` are taken off the logits of the answer's tokens, once and as often as
    they occur; `logit_bias` adds to single tokens' logits. `stop` ends the answer before one of these
    strings, wherever they stand after the thinking.
    `grammar`: the form that the answer, not the thinking before it, must have.
    `max_length`: tokens that prompt and answer have together at most.
    `thinking_budget`: after that many tokens without `</think>` the engine closes the thinking itself. `logprobs`: how
    many of the most probable tokens to report at every place. `ignore_eos`: the end token does not end the answer.

    None stands for the default; one stop string may stand alone, and biases in a dictionary. Raises UserError for what
    cannot be.
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
                "stop must be a text or a list of texts, stop_token_ids a list of token ids, logit_bias a dictionary "
                "of token ids and numbers"
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
            ("stop", all(isinstance(s, str) and s for s in self.stop), "must be texts, and not empty"),
            ("stop_token_ids", all(0 <= t < 1 << 31 for t in self.stop_token_ids), "must be token ids"),
            ("thinking_budget", self.thinking_budget is None or self.thinking_budget >= 0, "must be ≥ 0"),
            ("logprobs", self.logprobs >= 0, "must be ≥ 0"),
            ("grammar", self.grammar is None or isinstance(self.grammar, Grammar), "must be a Grammar"),
        ):
            if not ok:
                raise UserError(f"{name} = {getattr(self, name)}: {remedy}")

    @property
    def cut(self) -> SamplingFilter:
        return SamplingFilter(self.temperature, self.top_p, self.top_k, self.min_p)

    @cached_property
    def biases(self) -> tuple[Tensor, Tensor]:
        """Of logit_bias the tokens and what is added."""
        tokens, biases = zip(*self.logit_bias, strict=True)
        return torch.tensor(tokens), torch.tensor(biases)

    @property
    def adjusts(self) -> bool:
        """Whether the logits depend on what came before or on single tokens' biases."""
        plain = self.repetition_penalty == 1 and self.presence_penalty == self.frequency_penalty == 0
        return not plain or bool(self.logit_bias)


def adjust(logits: Tensor, params: SamplingParams, prompt: Tensor, made: Tensor) -> Tensor:
    """One row's logits [V] → those with penalties for the tokens of prompt and answer, and biases."""
    logits = logits.float()
    if params.repetition_penalty != 1:
        seen = torch.cat([prompt, made]).to(logits.device)  # some twice, which does no harm
        old = logits[seen]
        p = params.repetition_penalty
        logits = logits.index_put((seen,), torch.where(old > 0, old / p, old * p))
    if params.presence_penalty or params.frequency_penalty:
        counts = torch.bincount(made.to(logits.device), minlength=len(logits))
        logits = logits - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
    if params.logit_bias:
        tokens, biases = params.biases
        logits = logits.index_add(0, tokens.to(logits.device), biases.to(logits.device))
    return logits.clamp(-LARGEST, LARGEST)  # extreme penalties make infinities, whose differences are no numbers
