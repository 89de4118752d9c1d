"""Seconds of RL on this machine: rollout, rewards, training and evaluations of a recipe, each a count times a cost.

Lengths of answers and seconds of rewards are known from a rehearsal; without one, answers have half of the most tokens
on average, and the interval takes any mean for as likely as another.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from rorqual.kernels.dense_attention import skips_hidden
from rorqual.kernels.dtypes import compute_dtype
from rorqual.model.config import ModelConfig
from rorqual.plan.cost import flops_per_token, mtp_flops_per_token
from rorqual.plan.cpu_time import Costs, Counts, costs_here, step_counts
from rorqual.plan.engine_time import EngineCosts, decode_counts, engine_costs_here, prefill_counts, refresh_counts
from rorqual.plan.estimate import EMULATED
from rorqual.plan.fitting import interval
from rorqual.plan.hardware import describe_machine, matrix_peak
from rorqual.plan.optimizer_state import adapter_parameters
from rorqual.plan.published_runs import Z80
from rorqual.plan.rehearsal import RLRehearsal
from rorqual.plan.rl_plan import SPREAD, Lengths, StepParts, writing_seconds
from rorqual.recipe import RLRecipe

UNKNOWN_MEAN = (0.1, 0.5, 0.9)  # of the limit: deciles and median of a mean length that may be any
DRIFT, MOST_DRIFT = 0.02, 0.5  # of the logarithm of the mean length: a random walk, by a step; and along a run
LENGTH_MULTIPLE = 16  # of a block of packed answers
MASK_TILE = 64  # tokens, of what masks hide whole (kernels/cpu/csrc/masked_attention.cpp)


class RLPlan(TypedDict):
    """What a run is predicted to cost. Intervals are of 80 %."""

    tokens: float  # sampled, trained on, and of evaluations
    flops: float
    seconds: float
    seconds_interval: tuple[float, float]
    steps: float
    seconds_a_step: float  # without evaluations
    seconds_a_step_interval: tuple[float, float]
    tokens_per_second: float
    tokens_per_second_interval: tuple[float, float]
    parts: dict[str, float]  # seconds of a step
    evaluation_seconds: float  # of all evaluations
    mean_length: float
    utilisation: float
    calibration: str
    assumptions: list[str]
    matrix_peak_flops: float
    machine: dict[str, Any]


@dataclass(frozen=True)
class RLCosts:
    training: Costs
    sampler: EngineCosts  # of rollouts
    engine: EngineCosts  # of evaluations, which sample from the weights that are trained


def plan_rl_here(recipe: RLRecipe, config: ModelConfig, prompt: float, rehearsal: RLRehearsal | None = None) -> RLPlan:
    """prompt: mean tokens of the problems' prompts."""
    dtype, section = compute_dtype(recipe.model.dtype), recipe.grpo
    fp8 = section.rollout_weights == "fp8"
    engine = engine_costs_here(dtype)
    costs = RLCosts(costs_here(dtype), engine_costs_here(dtype, fp8=True) if fp8 else engine, engine)
    if rehearsal is None:
        low, mean, high = (share * section.max_tokens for share in UNKNOWN_MEAN)
        lengths = Lengths(prompt, max(1.0, mean), section.max_tokens)
        parts, scale = step_parts(recipe, config, costs, lengths), 1.0
        spread = math.hypot(
            _length_spread(recipe, config, costs, lengths, (low, high)),
            max(costs.training.spread, costs.sampler.spread),
        )
        trained = float(packed_tokens(recipe, config, lengths)[0])
    else:
        mean = min(max(1.0, rehearsal.median("length")), section.max_tokens)
        lengths = Lengths(rehearsal.prompt, mean, section.max_tokens, max(0.05, rehearsal.median("spread")))
        computed = step_parts(recipe, config, costs, lengths)
        parts = rehearsed_parts(computed, rehearsal)
        scale = 1.0 if section.rollout_weights else (parts.rollout + parts.tail) / (computed.rollout + computed.tail)
        spread, trained = rehearsal.noise, rehearsal.median("trained_tokens")
    each, evaluation = parts.total, scale * evaluation_seconds(recipe, config, costs.engine, lengths)
    steps = _steps(recipe, each, evaluation)
    if rehearsal is not None:
        spread = math.hypot(spread, min(MOST_DRIFT, DRIFT * math.sqrt(steps)))
    evaluations = _evaluations(recipe, steps)
    seconds = steps * each + evaluations * evaluation
    tokens, flops = _work(recipe, config, lengths, steps, trained, evaluations)
    peak = matrix_peak(dtype)
    low_rate, high_rate = interval(tokens / seconds, spread)
    return RLPlan(
        tokens=tokens,
        flops=flops,
        seconds=seconds,
        seconds_interval=interval(seconds, spread) if recipe.seconds is None else (seconds, seconds),
        steps=steps,
        seconds_a_step=each,
        seconds_a_step_interval=interval(each, spread),
        tokens_per_second=tokens / seconds,
        tokens_per_second_interval=(low_rate, high_rate),
        parts=vars(parts),
        evaluation_seconds=evaluations * evaluation,
        mean_length=lengths.mean,
        utilisation=flops / seconds / peak,
        calibration=_source(costs, rehearsal),
        assumptions=_assumptions(recipe, lengths, rehearsal),
        matrix_peak_flops=peak,
        machine=describe_machine(),
    )


def step_parts(
    recipe: RLRecipe, config: ModelConfig, costs: RLCosts, lengths: Lengths, trained: float | None = None
) -> StepParts:
    """Computed seconds of a step. trained: tokens, where groups without a signal are left out; None: all."""
    section, sampler = recipe.grpo, costs.sampler
    answers = float(section.questions_per_step * section.group_size)
    prefill, body, tail = sampling_seconds(config, sampler, section.questions_per_step, answers, section.
                                           rollout_max_num_seqs, lengths)  # fmt: skip
    train, forward = training_counts(recipe, config, lengths, trained)
    slower = EMULATED if recipe.precision else 1.0
    passes = (section.kl > 0) + (section.mini_batches > 1 and recipe.measures_mismatch)
    teachers = sum(
        share * costs.training.seconds(training_counts(recipe, teacher, lengths, trained)[1])
        for teacher, share in teacher_shares(recipe)
    )
    refresh = sampler.seconds(refresh_counts(config)) if section.rollout_weights == "fp8" else 0.0
    return StepParts(
        rollout=prefill + body,
        tail=tail,
        rewards=_scoring_seconds(recipe, config, costs, lengths),
        log_probabilities=passes * costs.training.seconds(forward) + teachers,
        training=slower * costs.training.seconds(train),
        weights=refresh,
        idle=0.0,
    )


def teacher_shares(recipe: RLRecipe) -> list[tuple[ModelConfig, float]]:
    """Of on-policy distillation: each environment's teacher, and the share of the tokens that it reads."""
    if recipe.opd is None:
        return []
    total = sum(section.weight for section in recipe.environments)
    return [
        (ModelConfig.load(path), section.weight / total)
        for section in recipe.environments
        if (path := recipe.opd.of(section.name)) is not None
    ]


def judged_share(recipe: RLRecipe) -> float:
    """Of the answers, those that a reward model scores."""
    if recipe.reward.model is None:
        return 0.0
    total = sum(section.weight for section in recipe.environments)
    return sum(section.weight for section in recipe.environments if section.open) / total


def judge_config(recipe: RLRecipe, config: ModelConfig) -> ModelConfig:
    """Sizes of the reward model that are computed; where it is not written yet, those of the policy."""
    path = recipe.reward.model.path if recipe.reward.model is not None else ""
    found = ModelConfig.load(path) if path and Path(path).exists() else config
    return found.replace(vocab_size=1, num_nextn_predict_layers=0)


def _scoring_seconds(recipe: RLRecipe, config: ModelConfig, costs: RLCosts, lengths: Lengths) -> float:
    answers = judged_share(recipe) * recipe.grpo.questions_per_step * recipe.grpo.group_size
    if not answers:
        return 0.0
    length, itemsize = round(lengths.prompt + lengths.mean), compute_dtype(recipe.model.dtype).itemsize
    found = step_counts(judge_config(recipe, config), [(answers, length)], itemsize, False)
    return costs.training.seconds(
        replace(Counts(**{name: value / 3 for name, value in vars(found).items()}), parameters=0.0)
    )


def sampling_seconds(
    config: ModelConfig, engine: EngineCosts, prompts: float, answers: float, places: float, lengths: Lengths
) -> tuple[float, float, float]:
    """Seconds of (prefill, decoding, decoding while less than half of the answers are open)."""
    prefill = engine.seconds(prefill_counts(config, prompts, lengths.prompt, answers))

    def decode(batch: float, context: float) -> float:
        return engine.seconds(decode_counts(config, batch, context))

    body, tail = writing_seconds(decode, answers, answers, min(answers, places), lengths)
    return prefill, body, tail


def training_counts(
    recipe: RLRecipe, config: ModelConfig, lengths: Lengths, trained: float | None = None
) -> tuple[Counts, Counts]:
    """Of a step's updates, and of a forward pass alone. trained: tokens; None: all."""
    section = recipe.grpo
    every, block = packed_tokens(recipe, config, lengths)
    tokens = every if trained is None else trained
    updates = section.mini_batches
    micro_batches = updates * max(1, math.ceil(tokens / updates / section.micro_tokens))
    itemsize = compute_dtype(recipe.model.dtype).itemsize
    rows = tokens / block / micro_batches
    adapters = None if recipe.lora is None else adapter_parameters(config, recipe.lora)
    found = step_counts(config, [(rows, block)] * micro_batches, itemsize, False, recipe.recompute, adapters=adapters)
    targets = section.questions_per_step * section.group_size * lengths.mean * tokens / every
    passes = 4 if recipe.recompute == "full" else 3
    of_weights = passes - (adapters is not None)
    head = 2.0 * config.vocab_size * config.hidden_size * of_weights
    # The head only for the answers' tokens.
    found = replace(
        found,
        products=found.products - head * (tokens - targets),
        attention=found.attention * attended(recipe, config, lengths, block),
        logits=targets * config.vocab_size,
    )
    third = Counts(**{name: value / 3 for name, value in vars(found).items()})
    forward = replace(third, products=found.products / of_weights, attention=found.attention / passes, parameters=0.0)
    muon = recipe.optimizer.name == "muon"
    update = step_counts(config, [(0, block)], itemsize, False, muon=muon, adapters=adapters)
    found = replace(
        found,
        products=found.products + updates * update.products,
        parameters=updates * update.parameters,
        orthogonalised=updates * update.orthogonalised,
    )
    return found, forward


def attended(recipe: RLRecipe, config: ModelConfig, lengths: Lengths, block: int) -> float:
    """Pairs of tokens that attention computes in a block, over those of a causal text of that length."""
    if not skips(recipe, config):
        return 2.0  # the mask's hidden parts too
    answers = max(1.0, (block - lengths.prompt) / lengths.mean)
    seen = lengths.prompt**2 / 2 + answers * lengths.mean * (lengths.prompt + lengths.mean / 2)
    return min(2.0, (seen + MASK_TILE * block) / (block**2 / 2))


def skips(recipe: RLRecipe, config: ModelConfig) -> bool:
    return skips_hidden(compute_dtype(recipe.model.dtype), *config.attention_widths)


def packed_tokens(recipe: RLRecipe, config: ModelConfig, lengths: Lengths) -> tuple[float, int]:
    """Tokens of a step in blocks of so many each, that hold a prompt and answers to it: as many blocks for a question
    as cost the least, as in rl/rollout_logprobs.py: a token costs what it does with four times the context, or with
    none where attention skips what masks hide."""
    section, best, context = recipe.grpo, (math.inf, 0.0, 0), 0 if skips(recipe, config) else 4
    for count in range(1, section.group_size + 1):
        answers = section.group_size / count
        whole = lengths.prompt + answers * max(0.0, lengths.mean - 1)
        block = max(1, math.ceil(whole / LENGTH_MULTIPLE)) * LENGTH_MULTIPLE
        if block > section.micro_tokens and answers > 1:
            continue
        cost = count * block * flops_per_token(config, context * block)
        if cost >= best[0]:
            break
        best = (cost, float(section.questions_per_step * count * block), block)
    return best[1], best[2]


def rehearsed_parts(computed: StepParts, rehearsal: RLRehearsal) -> StepParts:
    """The computed parts, scaled to what was measured; the parts of a rollout, and of training, keep their ratio."""
    rollout = rehearsal.median("rollout") / (computed.rollout + computed.tail)
    training = rehearsal.median("training") / (computed.log_probabilities + computed.training)
    rewards = rehearsal.median("rewards")
    parts = StepParts(
        rollout * computed.rollout, rollout * computed.tail, rewards, training * computed.log_probabilities,
        training * computed.training, 0.0, 0.0,
    )  # fmt: skip
    return replace(parts, weights=max(0.0, rehearsal.median("seconds") - parts.total))


def evaluation_seconds(recipe: RLRecipe, config: ModelConfig, engine: EngineCosts, lengths: Lengths) -> float:
    """Of one evaluation: a family of problems after another, one answer each."""
    if not recipe.eval_every:
        return 0.0
    n = float(recipe.eval_problems)
    places = recipe.grpo.rollout_max_num_seqs
    families = sum(not section.open for section in recipe.environments)
    return families * sum(sampling_seconds(config, engine, n, n, places, lengths))


def _steps(recipe: RLRecipe, each: float, evaluation: float) -> float:
    if recipe.steps is not None:
        return float(recipe.steps)
    assert recipe.seconds is not None
    if not recipe.eval_every:
        return max(1.0, recipe.seconds / each)
    return max(1.0, (recipe.seconds - 1.5 * evaluation) / (each + evaluation / recipe.eval_every))


def _evaluations(recipe: RLRecipe, steps: float) -> float:
    """At the start, every `eval_every` steps, and at the end."""
    return 1 + math.ceil(steps / recipe.eval_every) if recipe.eval_every else 0


def _work(
    recipe: RLRecipe, config: ModelConfig, lengths: Lengths, steps: float, trained: float, evaluations: float
) -> tuple[float, float]:
    """Tokens and FLOPs of a run, counted as its ledger does."""
    section = recipe.grpo
    sampled = steps * section.questions_per_step * section.group_size * lengths.mean
    evaluated = evaluations * sum(not section.open for section in recipe.environments) * recipe.eval_problems
    prompts = steps * section.questions_per_step + evaluated
    length = round(lengths.prompt + lengths.mean)
    a_token, frozen = flops_per_token(config, length, training=False), recipe.lora is not None
    trains = flops_per_token(config, length, frozen=frozen) + (section.kl > 0) * a_token
    trains += mtp_flops_per_token(config, length, frozen) if recipe.mtp.weight else 0.0
    trains += sum(share * flops_per_token(own, length, training=False) for own, share in teacher_shares(recipe))
    tokens = sampled + steps * trained + evaluated * lengths.mean
    read = sampled + evaluated * lengths.mean + prompts * lengths.prompt
    judged = judged_share(recipe) * steps * section.questions_per_step * section.group_size * length
    judging = judged * flops_per_token(judge_config(recipe, config), length, training=False) if judged else 0.0
    return tokens, a_token * read + trains * steps * trained + judging


def _length_spread(
    recipe: RLRecipe, config: ModelConfig, costs: RLCosts, lengths: Lengths, deciles: tuple[float, float]
) -> float:
    """Of the logarithm of a step's time, where the mean length may be any."""
    low, high = (step_parts(recipe, config, costs, replace(lengths, mean=max(1.0, mean))).total for mean in deciles)
    return math.log(high / low) / (2 * Z80)


def _source(costs: RLCosts, rehearsal: RLRehearsal | None) -> str:
    if rehearsal is not None:
        return f"rehearsed in {len(rehearsal.steps)} steps on this machine"
    return costs.training.source if costs.sampler.source == costs.training.source else costs.sampler.source


def _assumptions(recipe: RLRecipe, lengths: Lengths, rehearsal: RLRehearsal | None) -> list[str]:
    about = (
        f"prompts of {lengths.prompt:.3g} tokens, with what is said of tools; answers of {lengths.mean:.3g} on "
        f"average, at most {lengths.limit:g}"
    )
    if rehearsal is None:
        found = [
            f"{about}, log-normal with σ = {SPREAD:g}: half of the most, since nothing is known of them",
            "rewards by rule take no time, and all groups are trained on; --rehearse measures both",
        ]
    else:
        found = [f"{about}, as in the rehearsal; the mean drifts by {DRIFT:.0%} a step, as a random walk"]
    if recipe.grpo.max_draws > 1:
        more = recipe.grpo.max_draws - 1
        found.append(f"a step's first draw is enough; each of at most {more} further ones costs a rollout")
    if recipe.grpo.rollout_weights in ("int8", "int4") and rehearsal is None:
        found.append("packing the weights takes no time, and sampling from them as long as from those that are trained")
    if recipe.rollouts.workers is not None:
        found.append("rollout workers share this machine's cores with each other and with the training")
    return [*found, "checkpoints are not counted"]
