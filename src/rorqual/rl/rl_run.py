"""`rorqual rl`: from a recipe, over GRPOTrainer steps, evaluation and checkpoints, to a released model."""

import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from rorqual.checkpoint.huggingface import load_model, stored_dtype
from rorqual.errors import UserError
from rorqual.files import write_text
from rorqual.kernels.devices import find_device
from rorqual.model import Transformer
from rorqual.model.config import ModelConfig
from rorqual.plan.hardware import memory_used
from rorqual.plan.ledger import Ledger
from rorqual.plan.rehearsal import kept_rehearsal
from rorqual.plan.rl_here import RLPlan, plan_rl_here
from rorqual.precision.rollout_twin import check_device
from rorqual.recipe import DistillRecipe, RLRecipe
from rorqual.rl.context_limits import check_context
from rorqual.rl.envs.registry import Environment, open_environment
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.prompts import render_problem
from rorqual.rl.ray_rollouts import ray_cluster
from rorqual.rl.reward_scorer import check_reward_model
from rorqual.rl.rollout import derived_seed
from rorqual.rl.teachers import check_teachers, teacher_paths
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.train.build_model import build_model, tokenizer_of, trained_path
from rorqual.train.model_card import card
from rorqual.train.release import release_model
from rorqual.train.run_folder import open_run
from rorqual.train.run_loop import RunLoop
from rorqual.train.telemetry import Log

STAGES = ("rollout", "train", "evaluate")  # in the ledger; the first two are parts of a step
PROMPTS = 32  # whose mean length a plan takes


def rl(recipe: RLRecipe, resume: bool = False, ray: str | None = None) -> Path:
    """Run the recipe and return the run's folder, with the released model in model/.

    ray: where rollouts are sampled on Ray, see `ray_cluster`; None: in this process. Raises UserError for what the user
    can fix, Stopped after SIGINT or SIGTERM.
    """
    if ray and recipe.lora is not None:
        raise UserError("lora with --ray: workers are sent whole weights, not adapters; leave one of them out")
    recipe = on_ray(recipe) if ray else in_process(recipe)
    tokenizer, start = tokenizer_of(recipe.model), trained_path(recipe.model)
    config = ModelConfig.load(start)
    environments = [open_environment(section) for section in recipe.environments]
    if ray and (several := [e.family for e in environments if e.turns > 1]):
        raise UserError(f"environment {several[0]} with --ray: workers sample single turns; leave out --ray")
    check_problems(recipe, tokenizer, environments)
    with nullcontext() if ray is None else ray_cluster(recipe, config, ray) as cluster:
        device = find_device(recipe.device) if cluster is None else cluster.device
        check_device(recipe.grpo.rollout_weights, device)
        with open_run(recipe, resume, device) as run_dir:
            model = build_model(recipe.model, tokenizer, recipe.seed, lora=recipe.lora).to(device)
            with nullcontext() if cluster is None else cluster.fleet(recipe, model.config) as fleet:
                trainer = GRPOTrainer(model, tokenizer, environments, recipe, fleet=fleet)
                run = RLRun(run_dir, recipe, trainer, recipe.track)
                run.fit()
            if recipe.keep_start and run.got_worse():
                model, recipe = load_model(start, stored_dtype(start)), recipe.model_copy(update={"lora": None})
            _release(run, model, tokenizer, recipe)
    return run_dir


def on_ray(recipe: RLRecipe) -> RLRecipe:
    """The recipe with the defaults of rollouts on Ray. Raises UserError for settings that do not go with it."""
    given = recipe.rollouts
    if given.gpus is not None and recipe.device == "cpu":
        raise UserError(
            f"rollouts.gpus = {given.gpus:g} with device = cpu: workers compute as the trainer; leave one out"
        )
    if recipe.grpo.max_draws > 1:
        raise UserError(
            f"grpo.max_draws = {recipe.grpo.max_draws} with --ray: rollouts are sampled ahead, before it is known how "
            "many are needed; add grpo.max_draws=1, or leave out --ray"
        )
    defaults = {"workers": min(2, recipe.grpo.questions_per_step), "staleness": 1}
    chosen = {name: value for name, value in defaults.items() if getattr(given, name) is None}
    return recipe.model_copy(update={"rollouts": given.model_copy(update=chosen)})


def in_process(recipe: RLRecipe) -> RLRecipe:
    """The recipe. Raises UserError for settings that need Ray."""
    for name in ("workers", "staleness", "threads", "gpus"):
        if (value := getattr(recipe.rollouts, name)) is not None:
            raise UserError(f"rollouts.{name} = {value} needs Ray; add --ray local, or leave it out")
    return recipe


def check_problems(recipe: RLRecipe, tokenizer: Tokenizer, environments: Sequence[Environment]) -> None:
    """Check experts, prompts and problem counts. Raises UserError for what would stop the run, and its resumption, at a
    step.
    """
    config = ModelConfig.load(trained_path(recipe.model))
    if recipe.mtp.weight and not config.num_nextn_predict_layers:
        raise UserError(
            f"mtp.weight = {recipe.mtp.weight:g}: the model has no multi-token module (num_nextn_predict_layers); "
            "leave it out"
        )
    if recipe.rollouts.replay_routing and not config.n_routed_experts:
        raise UserError("rollouts.replay_routing = true: the model has no experts whose choice to replay; leave it out")
    if recipe.rollouts.replay_routing and (several := [e.family for e in environments if e.turns > 1]):
        raise UserError(
            f"rollouts.replay_routing with environment {several[0]}: experts are recorded of single turns; leave it out"
        )
    context, families = config.max_position_embeddings, [environment.family for environment in environments]
    if recipe.opd is not None:
        check_teachers(recipe.opd, families, tokenizer, config)
        for path in teacher_paths(recipe.opd, families):
            context = min(context, ModelConfig.load(path).max_position_embeddings)
    if recipe.reward.model is not None:
        context = min(context, check_reward_model(recipe.reward.model.path).max_position_embeddings)
    check_context(environments, recipe.template, tokenizer, context, recipe.grpo.max_tokens, "grpo.max_tokens")
    for environment in environments:
        next(environment.stream("train", derived_seed(recipe.seed, environment.family)))
        if recipe.eval_every and environment.all_problems() is not None and not environment.open:
            environment.problems("dev", recipe.eval_problems, recipe.seed)


def predict_rl(recipe: RLRecipe, config: ModelConfig, prompt: float) -> RLPlan:
    """What a run costs on this machine, with what a rehearsal of such a recipe has measured, if there was one.

    prompt: `prompt_tokens`.
    """
    return plan_rl_here(recipe, config, prompt, kept_rehearsal(recipe))


def prompt_tokens(recipe: RLRecipe | DistillRecipe, tokenizer: Tokenizer, environments: Sequence[Environment]) -> float:
    """Mean tokens of the prompts, of a few problems."""
    means: list[float] = []
    for environment in environments:
        problems = islice(environment.stream("train", derived_seed(recipe.seed, environment.family)), PROMPTS)
        means.append(fmean(len(render_problem(p, recipe.template, tokenizer)) for p in problems))
    return fmean(means, weights=[environment.weight for environment in environments])


@dataclass
class RLRun(RunLoop[RLRecipe, GRPOTrainer]):
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)  # step → eval_<family>
    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))  # seconds

    step_seconds: float = 0.0  # of all steps, without evaluations

    def predict(self) -> Mapping[str, Any]:
        trainer = self.trainer
        if trainer.device.type != "cpu":
            return {}
        prompt = prompt_tokens(self.section, trainer.engine.require_tokenizer(), list(trainer.environments.values()))
        return predict_rl(self.section, trainer.model.config, prompt)

    def begin(self, telemetry: Log) -> None:
        if self.section.eval_every and not self.evaluations:
            telemetry.log(0, **self._evaluate(), seconds=self.seconds)
        budget = self.section.seconds
        if budget is not None and not self.trainer.steps and self.done():
            raise UserError(
                f"seconds = {budget:g}: {self.seconds:.0f} have passed before the first step; raise seconds, or lower "
                "eval_problems"
            )

    def step(self, telemetry: Log) -> bool:
        start = time.monotonic()
        metrics = self.trainer.step(self.progress())
        self.stages["rollout"] += metrics.rollout_seconds  # of a fleet, at the same time as training
        seconds = time.monotonic() - start
        self.stages["train"] += seconds - metrics.wait_seconds
        self.step_seconds += seconds
        step = self.trainer.steps
        for note in metrics.notes:
            telemetry.note(note)
        if metrics.skipped:
            telemetry.note(f"step {step}: the gradient is not finite; update skipped")
        ended = self.done()
        if ended:  # a checkpoint would wait for what workers have begun
            self.trainer.rollouts.close()
        due = self.section.eval_every and (ended or step % self.section.eval_every == 0)
        shares = self._evaluate() if due else {}
        telemetry.log(
            step,
            seconds=self.seconds,
            memory_gb=memory_used(self.trainer.device.type) / 1e9,
            **metrics.to_dict(),
            **shares,
        )
        return ended

    def score(self) -> float | None:
        shares = self.evaluations.get(str(self.trainer.steps))
        return None if shares is None else -sum(shares.values()) / len(shares)

    def state(self) -> dict[str, Any]:
        return {"evaluations": self.evaluations, "stages": self.stages, "step_seconds": self.step_seconds}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.evaluations = state["evaluations"]
        self.stages = dict.fromkeys(STAGES, 0.0) | state["stages"]  # earlier versions did not have all
        self.step_seconds = state.get("step_seconds", self.stages["rollout"] + self.stages["train"])

    def got_worse(self) -> bool:
        """Whether pass@1 of the last evaluation is below the first."""
        means = {int(step): sum(shares.values()) for step, shares in self.evaluations.items()}
        return bool(means) and means[max(means)] < means[min(means)]

    def _evaluate(self) -> dict[str, float]:
        start = time.monotonic()
        shares = self.trainer.evaluate(self.section.eval_problems)
        self.stages["evaluate"] += time.monotonic() - start
        self.evaluations[str(self.trainer.steps)] = shares
        return shares


def _release(run: RLRun, model: Transformer, tokenizer: Tokenizer, recipe: RLRecipe) -> None:
    directory = run.run_dir / "model"
    release_model(model, directory, tokenizer, recipe)
    write_text(directory / "README.md", _card(run, model), then="then continue with --resume")
    trainer = run.trainer
    ledger = Ledger(run.run_dir, run.predicted, run.trainer.dtype, run.trainer.device.type)
    ledger.joules = run.joules
    for stage, tokens in zip(STAGES, (trainer.tokens, trainer.trained_tokens, trainer.evaluated_tokens), strict=True):
        if run.stages[stage]:
            ledger.add(stage, tokens=tokens, flops=trainer.flops[stage], seconds=run.stages[stage])
    ledger.measured["seconds_a_step"] = run.step_seconds / trainer.steps
    ledger.write()


def _card(run: RLRun, model: Transformer) -> str:
    recipe, trainer = run.section, run.trainer
    families = ", ".join(trainer.environments)
    text = f"""`{recipe.model.path}` after {trainer.steps} steps of reinforcement learning (GRPO) on {families}
by Rorqual (`rorqual rl`), seed {recipe.seed}: {trainer.tokens:,} sampled tokens, {run.seconds:,.0f} seconds.

## Accuracy
{_accuracy(run)}
"""
    return card(recipe, run.run_dir, [model.config.model_type, "grpo"], text)


def _accuracy(run: RLRun) -> str:
    """pass@1 as it was evaluated, or how to evaluate it."""
    recipe = run.section
    evaluated = [name for name, environment in run.trainer.environments.items() if not environment.open]
    if not evaluated:
        return "Not measured: nothing says which answers are right (open = true)."
    if not run.evaluations:
        words = ["rorqual", "eval", f"{run.run_dir}/model", "--tasks", f"{run.run_dir}/recipe.toml"]
        words += ["--against", trained_path(recipe.model), "--max-tokens", str(recipe.grpo.max_tokens)]
        words += [] if recipe.template == "chat" else ["--template", recipe.template]
        return (
            "Not measured during training (eval_every = 0). On held-out problems, paired with the model before:\n"
            f"```\n{shlex.join(words)}\n```"
        )
    head = f"| step | {' | '.join(evaluated)} |\n|---|{'---|' * len(evaluated)}"
    curve = [
        f"| {step} | {' | '.join(f'{share:.1%}' for share in shares.values())} |"
        for step, shares in run.evaluations.items()
    ]
    kept = ["\nThe last is below the first, so the released weights are the initial ones (keep_start)."]
    lines = ["pass@1 on held-out development problems:\n", head, *curve]
    return "\n".join(lines + (kept if recipe.keep_start and run.got_worse() else []))
