"""Groups of completions sampled from the policy, ready to be scored and packed."""

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
    logprobs: list[list[float]]  # of the completions' tokens when they were sampled
    texts: list[str]  # of the completions, as the model wrote them
    samples: list[Sample]  # [Q·G]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(map(len, self.completions))


def sample_groups(engine: Engine, problems: Sequence[Problem], template: Template, params: SamplingParams) -> Rollout:
    """`params.n` completions of every problem. Raises UserError for a prompt that leaves no room in the context."""
    start = time.monotonic()
    prompts = [render(p.question, template, engine.tokenizer) for p in problems]
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
    """A seed of 62 bits from a run's seed and whatever it is for, so that no state of a generator need be saved."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 2
