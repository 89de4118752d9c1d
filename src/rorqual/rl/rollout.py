"""Rollouts: groups of completions sampled from the policy."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.outputs import Completion
from rorqual.kernels.allowed_tokens import AllowedTokens
from rorqual.rl.envs.environment import Problem, Sample
from rorqual.rl.prompts import Template, render_problem
from rorqual.shapes import Int


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
    allowed: list[AllowedTokens] | None = None  # [Q·G] what tokens were sampled from, where filters left some out

    @property
    def lengths(self) -> Int[Tensor, " S"]:
        """The sampled tokens of every completion, which are those that losses are about."""
        return torch.tensor([sum(own) for own in self.sampled], dtype=torch.long)

    @property
    def tokens(self) -> int:
        """Sampled."""
        return int(self.lengths.sum())

    def of_groups(self, groups: Sequence[int]) -> "Rollout":
        """The part of some of the problems."""
        group = len(self.completions) // max(len(self.problems), 1)
        members = members_of(groups, group)
        lists: dict[str, Any] = {name: [getattr(self, name)[q] for q in groups] for name in BY_PROBLEM}
        for name in BY_COMPLETION:
            own = getattr(self, name)
            lists[name] = None if own is None else [own[i] for i in members]
        return Rollout(**lists, seconds=self.seconds)

    @classmethod
    def joined(cls, rollouts: Sequence["Rollout"]) -> "Rollout":
        """Of all their problems, sampled one after the other."""
        if len(rollouts) == 1:
            return rollouts[0]
        lists: dict[str, Any] = {}
        for name in (*BY_PROBLEM, *BY_COMPLETION):
            parts = [getattr(rollout, name) for rollout in rollouts]
            lists[name] = None if parts[0] is None else [item for part in parts for item in part]
        return cls(**lists, seconds=sum(rollout.seconds for rollout in rollouts))


BY_PROBLEM = ("problems", "prompts")
BY_COMPLETION = ("completions", "sampled", "logprobs", "texts", "samples", "routing", "allowed")


def members_of(groups: Sequence[int], size: int) -> list[int]:
    """The completions of groups of `size`."""
    return [q * size + k for q in groups for k in range(size)]


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
    allowed_words: Tensor | None = None  # int32 [W]: AllowedTokens of all tokens, as the next
    allowed_lengths: Tensor | None = None  # int32 [N]

    @classmethod
    def of(cls, completions: Sequence[Completion], seconds: float, version: int) -> "Shard":
        routing = [c.routing for c in completions if c.routing is not None]
        allowed = [c.allowed for c in completions if c.allowed is not None]
        whole = AllowedTokens.joined(allowed) if allowed else None
        return cls(
            torch.tensor([t for c in completions for t in c.tokens], dtype=torch.int32),
            torch.tensor([len(c.tokens) for c in completions], dtype=torch.int32),
            torch.tensor([p for c in completions for p in c.logprobs], dtype=torch.float32),
            torch.tensor([c.finish_reason == "length" for c in completions]),
            torch.tensor(seconds, dtype=torch.float64),
            torch.tensor(version),
            torch.cat(routing) if routing else None,
            whole and whole.words,
            whole and whole.lengths,
        )

    def allowed(self, vocab: int) -> list[AllowedTokens]:
        """Of each completion; empty where nothing was recorded."""
        if self.allowed_words is None or self.allowed_lengths is None:
            return []
        whole = AllowedTokens(self.allowed_words, self.allowed_lengths, vocab)
        return whole.split([int(n) for n in self.lengths])

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
    kept = [sets for shard in shards for sets in shard.allowed(engine.model.config.vocab_size)]
    allowed: list[AllowedTokens | None] = [*kept] if kept else [None] * len(sizes)
    completions: list[Completion] = []
    for i, (part, logp) in enumerate(
        zip(tokens.split_with_sizes(sizes), logprobs.split_with_sizes(sizes), strict=True)
    ):
        own = [int(t) for t in part.numpy()]
        text = engine.inputs.decode(own[:-1] if own[-1] in engine.end_tokens else own)
        reason = "length" if truncated[i] else "stop"
        logprobs_here = [float(p) for p in logp.numpy()]
        completions.append(Completion(text, own, logprobs_here, reason, routing=routing[i], allowed=allowed[i]))
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
        allowed=[c.allowed for c in completions if c.allowed is not None] or None,
    )


def derived_seed(*parts: object) -> int:
    """A 62-bit seed from the run's seed and its purpose, so that no generator state has to be saved."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 2
