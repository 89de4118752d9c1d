"""Rejection sampling: the best of n completions become SFT data (R1 §2.3.3)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.judge.extract_answer import final_summary
from rorqual.plan.distill_here import BATCH
from rorqual.recipe import FilterSection, RewardSection
from rorqual.rl.envs.environment import Environment, Problem, Sample
from rorqual.rl.episodes import sample_rollout
from rorqual.rl.prompts import Template, problem_text
from rorqual.rl.reward_scorer import RewardScorer
from rorqual.rl.rewards import score
from rorqual.rl.rollout import derived_seed
from rorqual.rl.sample_filter import refused

KEPT, NOT_BEST = "kept", "not among the best"
Counts = dict[str, Counter[str]]  # by family: how many completions were kept, or left out and why


@dataclass
class Batch:
    """Of one sampling call."""

    done: int  # problems so far, those of earlier batches included
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # kept
    counts: Counts = field(default_factory=Counts)

    def count(self, family: str, what: str, by: int = 1) -> None:
        self.counts.setdefault(family, Counter())[what] += by


def rejection_sample(
    engine: Engine,
    environments: Sequence[Environment],
    problems: int,
    template: Template,
    reward: RewardSection,
    params: SamplingParams,
    keep_per_problem: int = 1,
    seed: int = 0,
    start: int = 0,
    wanted: FilterSection | None = None,
    scorer: RewardScorer | None = None,
) -> Iterator[Batch]:
    """Sample `params.n` completions for each of `problems` training problems, split among `environments` by weight.

    Only correct, untruncated completions that pass the filter `wanted` are kept, at most `keep_per_problem` distinct
    ones per problem: highest reward first, then the shortest, since a longer one has more detours for the same result.
    Of open problems, which have no correct answer, any final summary will do; `scorer` rewards it.
    A row is {"prompt", "completion", "family", "reward", "length"}; prompt and completion are the text that the model
    read and wrote (special-token names in the question escaped as in rorqual.data.special_tokens). An episode of
    several turns has {"messages", "tools"} instead. `start`: problems already done; later batches do not depend on it.
    Raises UserError for episodes without a chat template.
    """
    wanted = wanted or FilterSection()
    by_family = {e.family: e for e in environments}
    if template != "chat" and (several := [e.family for e in environments if e.turns > 1]):
        raise UserError(
            f"environment {several[0]} with template = {template!r}: students learn several turns in chats; set 'chat'"
        )
    drawn = draw_problems(environments, problems, seed)
    for first in range(start, len(drawn), BATCH):
        asked = drawn[first : first + BATCH]
        sampling = replace(params, seed=derived_seed(seed, "rejection", first))
        rollout = sample_rollout(engine, asked, template, sampling, by_family)
        rewards = score(rollout.samples, by_family, reward, params.max_tokens, scorer=scorer)
        batch = Batch(first + len(asked))
        for q, problem in enumerate(asked):
            good: list[int] = []
            for i in range(q * params.n, (q + 1) * params.n):
                right = bool(rewards.correct[i]) if rewards.ruled[i] else None
                why = _why_not(rollout.samples[i], right, wanted, reward.target_language)
                why = "no reward" if rewards.skipped[i] else why
                if why is None:
                    good.append(i)
                else:
                    batch.count(problem.family, why)
            good.sort(key=lambda i: (-float(rewards.total[i]), rollout.samples[i].length))
            different = {said_in(rollout.samples[i]): i for i in reversed(good)}  # of equal ones, the best
            best = sorted(different.values(), key=good.index)[:keep_per_problem]
            batch.count(problem.family, KEPT, len(best))
            batch.count(problem.family, NOT_BEST, len(good) - len(best))
            prompt = problem_text(problem, template, engine.require_tokenizer())
            batch.rows += [
                (
                    {"messages": rollout.samples[i].messages, "tools": problem.tools}
                    if rollout.samples[i].turns
                    else {"prompt": prompt, "completion": rollout.texts[i]}
                )
                | {
                    "family": problem.family,
                    "reward": float(rewards.total[i]),
                    "length": rollout.samples[i].length,
                }
                for i in best
            ]
        yield batch


def _why_not(sample: Sample, correct: bool | None, wanted: FilterSection, language: str) -> str | None:
    """correct: None of an open problem's."""
    if sample.truncated:
        return "not ended"
    if correct is None and final_summary(sample.text) is None:
        return "no answer"
    return "wrong" if correct is False else refused(sample.text, sample.length, wanted, language)


def said_in(sample: Sample) -> str:
    """All that was said in a sample, to tell it from others."""
    return "\0".join(message["content"] or "" for message in sample.turns) or sample.text


def draw_problems(environments: Sequence[Environment], problems: int, seed: int) -> list[Problem]:
    """Distinct training problems, split among the environments in proportion to their weights."""
    total = sum(e.weight for e in environments)
    bounds = [round(problems * sum(e.weight for e in environments[:k]) / total) for k in range(len(environments) + 1)]
    drawn: list[Problem] = []
    for environment, low, high in zip(environments, bounds, bounds[1:], strict=False):
        drawn += environment.problems("train", high - low, derived_seed(seed, "rejection", environment.family))
    return drawn
