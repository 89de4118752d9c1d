"""Rollouts of environments with several turns: all episodes advance together, a turn at a time.

An episode's tokens are its prompt's, then those that the policy sampled, with the environment's turns between them
(turns.py). Seeds come from the rollout's, the episode and the turn, and all state lives within one rollout: a step that
is done again after an interruption is the same.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import torch

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.outputs import Completion
from rorqual.kernels.allowed_tokens import AllowedTokens
from rorqual.rl.envs.environment import Environment, Episode, Problem, RewardError, Sample
from rorqual.rl.prompts import Template
from rorqual.rl.rollout import Rollout, derived_seed, prompts_of, sample_groups
from rorqual.rl.turns import Turns


@dataclass
class Played:
    """An episode in tokens."""

    episode: Episode
    environment: Environment
    prompt: list[int]
    tokens: list[int] = field(default_factory=list[int])  # all after the prompt
    sampled: list[bool] = field(default_factory=list[bool])  # which of them the policy sampled
    logprobs: list[float] = field(default_factory=list[float])  # of those
    allowed: list[AllowedTokens] = field(default_factory=list[AllowedTokens])  # by turn, where they are recorded
    turns: int = 0  # of the model
    truncated: bool = False
    error: str = ""

    def add(self, tokens: Sequence[int], sampled: bool) -> None:
        self.tokens += tokens
        self.sampled += [sampled] * len(tokens)

    def sample(self) -> Sample:
        episode = self.episode
        turns = episode.messages[len(episode.problem.conversation) :]
        text = next(m["content"] or "" for m in reversed(turns) if m["role"] == "assistant")
        return Sample(episode.problem, text, len(self.logprobs), self.truncated, turns, episode.state, self.error)


def sample_rollout(
    engine: Engine,
    problems: Sequence[Problem],
    template: Template,
    params: SamplingParams,
    environments: Mapping[str, Environment],
) -> Rollout:
    """Sample `params.n` completions per problem, or as many episodes where environments (by family) have several turns.

    Raises UserError for a prompt that fills the model's context.
    """
    if engine.prefix_cache:
        engine.reset()  # the weights may have changed
    if all(environments[problem.family].turns == 1 for problem in problems):
        return sample_groups(engine, problems, template, params)
    start = time.monotonic()
    prompts = prompts_of(engine, problems, template)
    played = play(engine, problems, prompts, environments, template, params)
    samples = [p.sample() for p in played]
    return Rollout(
        problems=list(problems),
        prompts=prompts,
        completions=[p.tokens for p in played],
        sampled=[p.sampled for p in played],
        logprobs=[p.logprobs for p in played],
        texts=[sample.text for sample in samples],
        samples=samples,
        seconds=time.monotonic() - start,
        allowed=[AllowedTokens.joined(p.allowed) for p in played] if played[0].allowed else None,
    )


def play(
    engine: Engine,
    problems: Sequence[Problem],
    prompts: list[list[int]],
    environments: Mapping[str, Environment],
    template: Template,
    params: SamplingParams,
) -> list[Played]:
    """`params.n` episodes of each problem, in order; episode i is of problem i // n.

    `params.max_tokens`: of an episode after its prompt, the environment's turns included. Raises UserError for a prompt
    that fills the model's context.
    """
    seed = torch.seed() if params.seed is None else params.seed
    turns = Turns(engine.require_tokenizer(), template, engine.end_tokens)
    if engine.prefix_cache:  # what it keeps must not depend on how much earlier steps have allocated
        engine.reserve(max(map(len, prompts)) + params.max_tokens, len(prompts) * params.n)
    played: list[Played] = []
    for problem, prompt in zip(problems, prompts, strict=True):
        for _ in range(params.n):
            rng = Random(derived_seed(seed, "episode", len(played)))
            episode = Episode(problem, problem.conversation, rng, turns.calls(bool(problem.tools)))
            played.append(Played(episode, environments[problem.family], prompt))
    first = [replace(params, seed=seed, max_tokens=_room(one, params)) for one in played[:: params.n]]
    running, completions = list(range(len(played))), engine.generate(prompts, first)
    while running:
        for i, completion in zip(running, completions, strict=True):
            _take(played[i], completion, engine)
        running = [i for i in running if _goes_on(played[i], turns, params)]
        going = {i: played[i] for i in running}
        settings = [
            replace(params, n=1, seed=derived_seed(seed, "turn", i, one.turns), max_tokens=_room(one, params))
            for i, one in going.items()
        ]
        completions = engine.generate([one.prompt + one.tokens for one in going.values()], settings) if going else []
    return played


def _room(played: Played, params: SamplingParams) -> int:
    """Tokens that the model may sample in its next turn."""
    return min(params.max_tokens - len(played.tokens), played.environment.turn_tokens or params.max_tokens)


def _take(played: Played, completion: Completion, engine: Engine) -> None:
    """Add the model's turn."""
    opening = engine.opening(played.prompt + played.tokens)
    played.add(completion.tokens, sampled=True)
    played.logprobs += completion.logprobs
    played.allowed += [completion.allowed] if completion.allowed is not None else []
    played.turns += 1
    played.truncated = completion.finish_reason == "length"
    played.episode.messages.append({"role": "assistant", "content": opening + completion.text})


def _goes_on(played: Played, turns: Turns, params: SamplingParams) -> bool:
    """Let the environment respond, and add its turn where the model has another."""
    if played.truncated:
        return False
    episode = played.episode
    try:
        said = played.environment.respond(episode)
    except RewardError as e:
        played.error = str(e)
        return False
    if said is None:
        return False
    tokens = turns.tokens(said, episode.problem.tools, played.tokens[-1])
    if played.turns == played.environment.turns or len(played.tokens) + len(tokens) >= params.max_tokens:
        played.truncated = True  # it was not the model that ended it
        return False
    episode.messages += said
    played.add(tokens, sampled=False)
    return True
