"""Rollouts: groups of completions sampled from the policy."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rorqual.engine import Engine, SamplingParams
from rorqual.rl.envs.environment import Problem
from rorqual.rl.prompts import Template, render
from rorqual.rl.rewards import Sample


@dataclass(frozen=True)
class Rollout:
    """Q problems with G completions each; completion i belongs to problem i // G."""

    problems: list[Problem]
    prompts: list[list[int]]  # [Q] token ids
    completions: list[list[int]]  # [Q·G] token ids, the stop token included
    logprobs: list[list[float]]  # [Q·G] of the completion tokens, under the policy that sampled them
    texts: list[str]  # [Q·G] the completions as text
    samples: list[Sample]  # [Q·G] what rewards are computed from
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(map(len, self.completions))


def sample_groups(engine: Engine, problems: Sequence[Problem], template: Template, params: SamplingParams) -> Rollout:
    """Sample `params.n` completions per problem. Raises UserError for a prompt that fills the model's context."""
    start = time.monotonic()
    tokenizer = engine.require_tokenizer()
    prompts = [render(p.question, template, tokenizer) for p in problems]
    completions = engine.generate(prompts, params)
    openings = [engine.opening(prompt) for prompt in prompts]
    samples = [
        Sample(problems[i // params.n], openings[i // params.n] + c.text, len(c.tokens), c.finish_reason == "length")
        for i, c in enumerate(completions)
    ]
    return Rollout(
        problems=list(problems),
        prompts=prompts,
        completions=[c.tokens for c in completions],
        logprobs=[c.logprobs for c in completions],
        texts=[c.text for c in completions],
        samples=samples,
        seconds=time.monotonic() - start,
    )


def derived_seed(*parts: object) -> int:
    """A 62-bit seed from the run's seed and its purpose, so that no generator state has to be saved."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 2
