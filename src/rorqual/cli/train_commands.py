"""rorqual pretrain, sft, rl, distill, reward, speedrun and report."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from rorqual.cli.options import DryRun, Overrides, Ray, RecipeFile, Resume, check_ray, expand_path, within

if TYPE_CHECKING:
    import torch

    from rorqual.model import ModelConfig
    from rorqual.recipe import PretrainRecipe, Recipe, RLRecipe, SFTRecipe

RecipeT = TypeVar("RecipeT", "PretrainRecipe", "SFTRecipe")


Processes = Annotated[
    int | None,
    typer.Option(callback=within(1, 4096), help="processes on this machine; default: as many as [parallel] needs"),
]


def pretrain(
    recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False,
    processes: Processes = None,
) -> None:  # fmt: skip
    """Pre-train a model on text."""
    from rorqual.recipe import PretrainRecipe
    from rorqual.train.training_run import pretrain as run

    _train(PretrainRecipe, run, recipe, overrides, resume, dry_run, processes)


def sft(
    recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False,
    processes: Processes = None,
) -> None:  # fmt: skip
    """Fine-tune a model on conversations, with the loss on the assistant's turns."""
    from rorqual.recipe import SFTRecipe
    from rorqual.train.training_run import sft as run

    _train(SFTRecipe, run, recipe, overrides, resume, dry_run, processes)


def _train(
    kind: "type[RecipeT]", run: "Callable[[RecipeT, bool], Path]", path: Path, overrides: list[str] | None,
    resume: bool, dry: bool, processes: int | None,
) -> None:  # fmt: skip
    from rorqual.parallel.launch import launch, restarted, started_by_torchrun, with_processes
    from rorqual.recipe import load_recipe
    from rorqual.train.dry_run import dry_run_text, recipe_config

    recipe = load_recipe(path, kind, overrides)
    if processes is not None:
        recipe.parallel = with_processes(recipe.parallel, processes)
    if dry:
        print(dry_run_text(recipe))
        _print_precision(recipe, recipe_config(recipe))
        return
    if recipe.parallel.processes > 1 and not started_by_torchrun():
        status = launch(sys.argv[1:], recipe.parallel.processes, recipe.parallel.restarts)
        if status:
            raise typer.Exit(status)
        return
    run_dir = run(recipe, resume or restarted())
    if int(os.environ.get("RANK", "0")) == 0:
        _finished(run_dir)


def rl(
    recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False, ray: Ray = None
) -> None:
    """RL-tune a model on verifiable problems (GRPO)."""
    from rorqual.kernels.devices import find_device
    from rorqual.kernels.dtypes import compute_dtype, dtype_name
    from rorqual.model import ModelConfig
    from rorqual.plan.cost import parameters
    from rorqual.plan.optimizer_state import adapter_bytes
    from rorqual.plan.process_memory import memory
    from rorqual.plan.rl_text import rl_time_text
    from rorqual.precision.rollout_twin import check_device, twin_bytes
    from rorqual.recipe import RLRecipe, load_recipe
    from rorqual.rl.envs.registry import open_environment
    from rorqual.rl.ray_gpus import device_here
    from rorqual.rl.rl_run import check_problems, in_process, on_ray, predict_rl, prompt_tokens
    from rorqual.rl.rl_run import rl as run
    from rorqual.rl.shown_prompts import first_prompts
    from rorqual.rl.teachers import teacher_paths
    from rorqual.train.build_model import check_model, tokenizer_of, trained_path

    check_ray(ray)
    checked = load_recipe(recipe, RLRecipe, overrides)
    if dry_run:
        checked = on_ray(checked) if ray else in_process(checked)
        tokenizer = tokenizer_of(checked.model)
        check_model(checked.model, checked.lora)
        environments = [open_environment(section) for section in checked.environments]
        check_problems(checked, tokenizer, environments)
        config = ModelConfig.load(trained_path(checked.model))
        print("\n".join(first_prompts(checked, tokenizer, environments)), end="\n\n")
        total, active = parameters(config)
        device = device_here(checked, ray) if ray else find_device(checked.device)
        check_device(checked.grpo.rollout_weights, device)
        dtype = dtype_name(compute_dtype(checked.model.dtype, device))
        needed = memory(
            config,
            checked.grpo.micro_tokens,
            dtype=dtype,
            optimizer=checked.optimizer,
            fp8=checked.precision is not None,
            recompute=checked.recompute,
            accumulated=True,
            lora=checked.lora,
        )
        print(f"{'parameters':<12} {total:.4g}, {active:.4g} active per token")
        kept = needed.weights if checked.lora is None else adapter_bytes(config, dtype, checked.lora)
        reference = kept if checked.grpo.kl else 0
        sampled = checked.grpo.rollout_weights
        twin = twin_bytes(config, sampled, compute_dtype(checked.model.dtype, device)) if sampled else 0
        teachers = 0
        if checked.opd is not None:
            paths = teacher_paths(checked.opd, [section.name for section in checked.environments])
            itemsize = compute_dtype(checked.model.dtype, device).itemsize
            teachers = sum(itemsize * parameters(ModelConfig.load(path))[0] for path in paths)
        judge = 0
        if checked.reward.model is not None:
            scored = ModelConfig.load(checked.reward.model.path).replace(tie_word_embeddings=True)
            judge = compute_dtype(checked.model.dtype, device).itemsize * parameters(scored)[0]
        total_bytes = needed.total + reference + twin + teachers + judge
        print(f"{'memory':<12} about {total_bytes / 1e9:.3g} GB in training, without the rollouts' KV cache")
        if reference:
            print(f"{'':<12} {reference / 1e9:.3g} GB of it for the reference model (grpo.kl)")
        if teachers:
            print(f"{'':<12} {teachers / 1e9:.3g} GB of it for the teachers (opd)")
        if judge:
            print(f"{'':<12} {judge / 1e9:.3g} GB of it for the reward model (reward.model)")
        if twin:
            print(f"{'':<12} {twin / 1e9:.3g} GB of it for the {sampled} weights that rollouts are sampled from")
        if ray:
            _print_workers(checked, config, device)
        if device.type == "cpu":
            print(rl_time_text(predict_rl(checked, config, prompt_tokens(checked, tokenizer, environments)), checked))
        _print_precision(checked, config)
        return
    _finished(run(checked, resume=resume, ray=ray))


def _print_workers(recipe: "RLRecipe", config: "ModelConfig", device: "torch.device") -> None:
    from rorqual.kernels.dtypes import compute_dtype
    from rorqual.rl.ray_gpus import share
    from rorqual.rl.weight_push import push_bytes

    pushed = push_bytes(config, compute_dtype(recipe.model.dtype, device), recipe.grpo.rollout_weights)
    section = recipe.rollouts
    versions = (section.staleness or 0) + 1
    gpus = "" if device.type == "cpu" else f", with {share(recipe):g} GPU each, as the trainer"
    print(f"{'workers':<12} {section.workers} on Ray{gpus}, rollouts up to {section.staleness} steps stale")
    print(f"{'':<12} {pushed / 1e9:.3g} GB of weights each, without their KV cache")
    print(f"{'pushed':<12} {pushed / 1e9:.3g} GB a step; Ray's object store holds up to {versions} versions")


def _print_precision(recipe: "Recipe", config: "ModelConfig") -> None:
    from rorqual.precision.convert import described

    if recipe.precision is not None:
        print("\n".join(described(config, recipe.precision)))


def distill(
    recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False
) -> None:  # fmt: skip
    """Distill: sample a teacher, keep the best answers (rejection sampling), fine-tune a student on them."""
    from rorqual.recipe import WORKED_SOLUTIONS, DistillRecipe, load_recipe

    checked = load_recipe(recipe, DistillRecipe, overrides)
    if dry_run:
        from rorqual.cli.plan_command import show_plan
        from rorqual.rl.shown_prompts import worked_sample
        from rorqual.train.build_model import tokenizer_at

        if checked.teacher == WORKED_SOLUTIONS:
            print(worked_sample(checked, tokenizer_at(checked.tokenizer_path)), end="\n\n")
        show_plan([str(recipe), *(overrides or [])])
        return
    from rorqual.rl.distillation import distill as run

    _finished(run(checked, resume=resume))


def reward(recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Train a reward model on pairs of a better and a worse answer."""
    from rorqual.recipe import RewardRecipe, load_recipe
    from rorqual.rl.reward_training import dry_run_text
    from rorqual.rl.reward_training import reward as run
    from rorqual.train.reward_run import described, read_result

    checked = load_recipe(recipe, RewardRecipe, overrides)
    if dry_run:
        print(dry_run_text(checked))
        return
    run_dir = run(checked, resume)
    _finished(run_dir)
    print(described(read_result(run_dir)))


def _finished(run_dir: Path) -> None:
    from rorqual.extras import MissingExtra
    from rorqual.report import write_report

    try:
        report = f"the report in {write_report(run_dir)}"
    except MissingExtra as e:
        report = f"no report: {e}"
    print(f"{run_dir}: done; the model is in {_model_in(run_dir)}, {report}")


def _model_in(run_dir: Path) -> Path:
    from rorqual.model.model_directory import model_directory

    return model_directory(run_dir)


def speedrun(
    seed: Annotated[int, typer.Option(callback=within(0, 2**32 - 1), help="seed of the whole run")] = 0,
    minutes: Annotated[
        float, typer.Option(callback=within(0, 10**6, above=True), help="wall time of the whole run")
    ] = 10.0,
    out: Annotated[Path | None, typer.Option(help="the run's folder; default: a new one in runs/")] = None,
) -> None:
    """Train a small R1 from scratch: tokenizer, pre-training, GRPO, rejection sampling, SFT, evaluation, report."""
    from rorqual.speedrun import speedrun as run

    run(out and expand_path(out), seed, minutes)


def r1(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="a TOML file of stages; see recipes/")],
    out: Annotated[Path | None, typer.Option(help="folder of the whole; default: the file's, or runs/NAME")] = None,
    seed: Annotated[
        int | None, typer.Option(callback=within(0, 2**31 - 1), help="of the first stage; each next: 1000 more")
    ] = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Run the stages of a pipeline, such as R1's, with an evaluation after each."""
    if dry_run:
        from rorqual.cli.plan_command import show_plan
        from rorqual.plan.pipeline_file import pipeline_at

        file = expand_path(pipeline)
        show_plan([str(file)], pipeline_at(file, out and expand_path(out), seed)[1], seed)
        return
    from rorqual.pipeline import run_pipeline

    folder = run_pipeline(expand_path(pipeline), out and expand_path(out), seed, resume)
    print(f"{folder}: done; the model is in {folder / 'model'}, its card and report.html beside it")


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, e.g. runs/NAME")]) -> None:
    """Write RUN/report.html and RUN/figures/."""
    from rorqual.report import write_report

    print(write_report(expand_path(run)))
