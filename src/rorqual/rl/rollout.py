"""Rollouts: groups of completions sampled from the policy."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.outputs import Completion
from rorqual.rl.envs.environment import Problem, Sample
from rorqual.rl.prompts import Template, render_problem


@dataclass(frozen=True)
class Rollout:
    """Q problems with G completions each; completion i belongs to problem i // G."""

    problems: list[Problem]
    prompts: list[list[int]]  # [Q] token ids
    completions: list[list[int]]  # [Q·G] all token ids after the prompt, stop tokens included
    sampled: list[list[bool]]  # [Q·G] which of them the policy sampled: all but those of an environment's turns
    logprobs: list[list[float]]  # [Q·G] of the sampled tokens, under the policy that sampled them
    texts: list[str]  # [Q·G] the completions as text; of several turns, the last
    samples: list[Sample]  # [Q·G] what rewards are computed from
    seconds: float  # that sampling took; of shards, the slowest
    routing: list[Tensor] | None = None  # [Q·G] of the experts (Completion.routing), where they are recorded

    @property
    def lengths(self) -> list[int]:
        """[Q·G] sampled tokens."""
        return list(map(sum, self.sampled))

    @property
    def tokens(self) -> int:
        """Sampled."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Shard:
    """S completions of N tokens in all, as numbers: what a rollout worker returns, and what a checkpoint keeps."""

    tokens: Tensor  # int32 [N]
    lengths: Tensor  # int32 [S]
    logprobs: Tensor  # float32 [N]
    truncated: Tensor  # bool [S]
    seconds: Tensor  # float64 []
    version: Tensor  # int64 []: steps after which the weights were those it was sampled from
    routing: Tensor | None = None  # int16 [R, L, K]: Completion.routing of all completions

    @classmethod
    def of(cls, completions: Sequence[Completion], seconds: float, version: int) -> "Shard":
        routing = [c.routing for c in completions if c.routing is not None]
        return cls(
            torch.tensor([t for c in completions for t in c.tokens], dtype=torch.int32),
            torch.tensor([len(c.tokens) for c in completions], dtype=torch.int32),
            torch.tensor([p for c in completions for p in c.logprobs], dtype=torch.float32),
            torch.tensor([c.finish_reason == "length" for c in completions]),
            torch.tensor(seconds, dtype=torch.float64),
            torch.tensor(version),
            torch.cat(routing) if routing else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


def sample_groups(engine: Engine, problems: Sequence[Problem], template: Template, params: SamplingParams) -> Rollout:
    """Sample `params.n` completions per problem. Raises UserError for a prompt that fills the model's context."""
    start = time.monotonic()
    prompts = prompts_of(engine, problems, template)
    completions = engine.generate(prompts, params)
    return _rollout(engine, problems, prompts, completions, time.monotonic() - start)


def assemble(engine: Engine, problems: Sequence[Problem], prompts: list[list[int]], shards: Sequence[Shard]) -> Rollout:
    """The rollout whose completions are in `shards`, in the order of the problems. `engine` decodes their text."""
    sizes = [int(size) for shard in shards for size in shard.lengths]
    tokens, logprobs, truncated = (
        torch.cat([getattr(shard, name) for shard in shards]) for name in ("tokens", "logprobs", "truncated")
    )
    tables = [shard.routing for shard in shards if shard.routing is not None]
    routing: list[Tensor | None] = [None] * len(sizes)
    if tables:
        group = len(sizes) // len(prompts)
        read = [len(prompts[i // group]) + size - 1 for i, size in enumerate(sizes)]
        routing = list(torch.cat(tables).split_with_sizes(read))
    completions: list[Completion] = []
    for i, (part, logp) in enumerate(
        zip(tokens.split_with_sizes(sizes), logprobs.split_with_sizes(sizes), strict=True)
    ):
        own = [int(t) for t in part.numpy()]
        text = engine.inputs.decode(own[:-1] if own[-1] in engine.end_tokens else own)
        reason = "length" if truncated[i] else "stop"
        completions.append(Completion(text, own, [float(p) for p in logp.numpy()], reason, routing=routing[i]))
    return _rollout(engine, problems, prompts, completions, max(float(shard.seconds) for shard in shards))


def prompts_of(engine: Engine, problems: Sequence[Problem], template: Template) -> list[list[int]]:
    tokenizer = engine.require_tokenizer()
    return [render_problem(p, template, tokenizer) for p in problems]


def _rollout(
    engine: Engine,
    problems: Sequence[Problem],
    prompts: list[list[int]],
    completions: Sequence[Completion],
    seconds: float,
) -> Rollout:
    group = len(completions) // len(prompts)
    openings = [engine.opening(prompt) for prompt in prompts]
    samples = [
        Sample(problems[i // group], openings[i // group] + c.text, len(c.tokens), c.finish_reason == "length")
        for i, c in enumerate(completions)
    ]
    routing = [c.routing for c in completions if c.routing is not None]
    return Rollout(
        problems=list(problems),
        prompts=prompts,
        completions=[c.tokens for c in completions],
        sampled=[[True] * len(c.tokens) for c in completions],
        logprobs=[c.logprobs for c in completions],
        texts=[c.text for c in completions],
        samples=samples,
        seconds=seconds,
        routing=routing or None,
    )


def derived_seed(*parts: object) -> int:
    """A 62-bit seed from the run's seed and its purpose, so that no generator state has to be saved."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 2
