"""The stages of recipes and of a pipeline's file, for `rorqual plan`."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rorqual.cli.options import expand_path
from rorqual.data.tokenizer import load_tokenizer
from rorqual.errors import UserError
from rorqual.kernels.devices import find_device
from rorqual.model import ModelConfig
from rorqual.parallel.mesh import ranks_per_node
from rorqual.plan.chips import chip_called, find_chip, known_chips
from rorqual.plan.distill_here import answers_seconds, training_rows
from rorqual.plan.estimate import predict
from rorqual.plan.hardware import gpu_name, memory_total
from rorqual.plan.known_models import find_model
from rorqual.plan.pipeline_file import COMMON, Stage, is_pipeline, read_pipeline, recipe_kind
from rorqual.plan.pipeline_plan import PipelinePlan
from rorqual.plan.plan_stage import plan_stage
from rorqual.plan.recipe_request import check_length_known, recipe_layout, recipe_request
from rorqual.plan.request import DistillRequest, parse_request
from rorqual.plan.reward_here import pair_sizes, predict_reward, sampling_seconds
from rorqual.plan.sampling_plan import trained_for
from rorqual.plan.stage import StagePlan
from rorqual.plan.this_machine import predicted_here, rl_predicted_here
from rorqual.recipe import (
    WORKED_SOLUTIONS,
    DistillRecipe,
    ParallelSection,
    PretrainRecipe,
    Recipe,
    RewardRecipe,
    RLRecipe,
    SFTRecipe,
    load_recipe,
)
from rorqual.train.build_model import model_config, tokenizer_at, trained_path
from rorqual.train.dry_run import recipe_config


def plan_files(
    words: list[str], given: Mapping[str, Any], more_chips: Path | None, rehearse: int | None = None,
    out: Path | None = None, seed: int | None = None,
) -> StagePlan | PipelinePlan:  # fmt: skip
    """Of recipes, each with overrides, and pipelines' files; rehearse: steps of each recipe to run before.

    out, seed: of a pipeline's stages, instead of the file's and the recipes'.

    Raises UserError.
    """
    pipeline = _Pipeline(dict(given), more_chips, rehearse)
    names = []
    for path, overrides in _files(words):
        if is_pipeline(path):
            if overrides:
                raise UserError(f"{overrides[0]}: overrides are for recipes; change {path}, or plan its recipes")
            found = read_pipeline(path, out, seed)
            names.append(found.name)
            for stage in found.stages:
                pipeline.add(stage)
        else:
            pipeline.add(Stage(str(path), {}, recipe=path), overrides)
    stages = tuple(pipeline.stages)
    return stages[0] if len(stages) == 1 else PipelinePlan(", ".join(names) or "pipeline", stages)


def _files(words: list[str]) -> list[tuple[Path, list[str]]]:
    """Each file with the overrides after it."""
    found: list[tuple[Path, list[str]]] = []
    for word in words:
        if word.endswith(".toml") and "=" not in word:
            found.append((expand_path(Path(word)), []))
        else:
            found[-1][1].append(word)
    return found


WRITTEN_PROMPT = 100.0  # tokens of an RL problem, where the tokenizer is not written yet


@dataclass
class _Pipeline:
    """Stages that follow each other."""

    given: dict[str, Any]  # on the command line, for all stages
    more_chips: Path | None
    rehearse: int | None = None  # steps
    stages: list[StagePlan] = field(default_factory=list)
    written: dict[Path, ModelConfig] = field(default_factory=dict)  # by stages before
    tokenizers: dict[Path, str | None] = field(default_factory=dict)  # theirs; None: not written yet

    def add(self, stage: Stage, overrides: list[str] | None = None) -> None:
        fields = stage.fields | self.given
        if "gpu" in self.given and "price" not in self.given:
            fields.pop("price", None)  # the file's is of another chip
        if stage.recipe is not None:
            words = [*stage.overrides, *(overrides or [])]
            self.stages.append(self._recipe(stage, load_recipe(stage.recipe, recipe_kind(stage.recipe), words), fields))
            return
        assert stage.kind is not None
        # What only one of several stages could mean.
        if unknown := self.given.keys() - set(COMMON):
            raise UserError(f"--{min(unknown)}: stages of a pipeline say their own; change {stage.where}")
        request = parse_request(stage.kind, fields, self._said(stage))
        before = self.stages[-1].config if self.stages else None
        self.stages.append(plan_stage(request, before, self.more_chips, written=self.written))

    def _recipe(self, stage: Stage, recipe: Recipe, fields: dict[str, Any]) -> StagePlan:
        config = self._config(recipe)
        folder = recipe.run_dir / "student" if isinstance(recipe, DistillRecipe) else recipe.run_dir
        self.written[folder / "model"] = config
        self.tokenizers[folder / "model"] = self._tokenizer(recipe)
        said = fields.pop("gpu", None)
        gpu = said or self._found_chip(recipe)
        if isinstance(recipe, DistillRecipe) and recipe.teacher == WORKED_SOLUTIONS:
            return self._worked(recipe, config, fields, gpu, stage)
        if gpu.lower() == "cpu" and not isinstance(recipe, DistillRecipe):
            return self._here(recipe, config, fields)
        if self.rehearse is not None:
            other = (
                "" if isinstance(recipe, DistillRecipe) else ", or leave out --gpu" if said else ", or add --gpu cpu"
            )
            raise UserError(
                f"--rehearse {self.rehearse}: {recipe.name} is planned for a chip, not run on this machine; "
                f"leave it out{other}"
            )
        if gpu.lower() == "cpu" and isinstance(recipe, DistillRecipe):
            return self._sampled(recipe, config, fields, stage)
        asked = recipe_request(recipe) | {"name": recipe.name, "gpu": gpu} | fields
        if isinstance(recipe, RLRecipe) or (said is None and gpu != "cpu"):
            asked.setdefault("gpus", 1)
        check_length_known(recipe, asked)
        request = parse_request(
            "sft" if isinstance(recipe, RewardRecipe) else _kind_of(recipe), asked, self._said(stage)
        )
        layout = None
        if isinstance(recipe, PretrainRecipe | SFTRecipe):
            layout = recipe_layout(recipe, find_chip(gpu, self.more_chips).per_node)
        plan = plan_stage(request, config, self.more_chips, layout, self.written)
        seconds = recipe.train.seconds if isinstance(recipe, DistillRecipe) else None
        return plan if seconds is None else trained_for(plan, seconds)

    def _worked(
        self, recipe: DistillRecipe, config: ModelConfig, fields: dict[str, Any], gpu: str, stage: Stage
    ) -> StagePlan:
        """Solutions are written in seconds, so that fine-tuning is all of it."""
        from rorqual.rl.distillation import student_recipe
        from rorqual.rl.worked_samples import worked_tokens

        student = student_recipe(recipe, recipe.run_dir, recipe.run_dir / "samples.jsonl")
        student.name = recipe.name
        samples = recipe.problems * recipe.keep_per_problem
        tokens = samples * worked_tokens(recipe, tokenizer_at(recipe.tokenizer_path))
        if gpu.lower() == "cpu":
            rows = math.ceil(tokens / recipe.sequence_length)
            return predicted_here(student, config, predict(config, student, rows), fields.get("price"))
        asked = recipe_request(student) | {"name": recipe.name, "gpu": gpu} | fields
        asked.setdefault("tokens", tokens * (recipe.train.epochs or 1.0))
        return plan_stage(parse_request("sft", asked, self._said(stage)), config, self.more_chips, None, self.written)

    def _sampled(self, recipe: DistillRecipe, config: ModelConfig, fields: dict[str, Any], stage: Stage) -> StagePlan:
        """A model's answers, then fine-tuning on those that are kept, on this machine."""
        from rorqual.rl.distillation import student_recipe

        price = fields.pop("price", None)
        _check_fields({name: value for name, value in fields.items() if name not in ("prompt", "answer", "correct")})
        asked = recipe_request(recipe) | {"name": recipe.name, "gpu": "cpu"} | fields
        asked.setdefault("prompt", self._prompt(recipe))
        request = parse_request("distill", asked, self._said(stage))
        assert isinstance(request, DistillRequest)
        teacher = self.written.get(Path(recipe.teacher)) or find_model(recipe.teacher)
        student = student_recipe(recipe, recipe.run_dir, recipe.run_dir / "samples.jsonl")
        student.name = recipe.name
        predicted = predict(config, student, training_rows(request, recipe.sequence_length))
        plan = predicted_here(student, config, predicted, price, answers_seconds(request, teacher))
        guess = (
            f"answers of {request.answer:g} tokens on average; {request.correct:.0%} of the problems have a correct one"
        )
        return replace(plan, kind="distill", assumptions=(*plan.assumptions, guess))

    def _prompt(self, recipe: RLRecipe | DistillRecipe) -> float:
        """Mean tokens of the problems' prompts; a guess where the tokenizer is not written yet."""
        from rorqual.rl.envs.registry import open_environment
        from rorqual.rl.rl_run import prompt_tokens

        path = self._tokenizer(recipe)
        if path is None:
            return WRITTEN_PROMPT
        return prompt_tokens(recipe, tokenizer_at(path), [open_environment(e) for e in recipe.environments])

    def _tokenizer(self, recipe: Recipe) -> str | None:
        """The directory with the tokenizer that the recipe's model has; None where that is not written yet."""
        section = getattr(recipe, "tokenizer", None)
        path = recipe.model.path if section is None or section.path is None else section.path
        return None if path is None else self.tokenizers.get(Path(path), path)

    def _found_chip(self, recipe: Recipe) -> str:
        """The chip that the recipe would run on here. Raises UserError for a GPU that the data does not know."""
        section = recipe.parallel if isinstance(recipe, PretrainRecipe | SFTRecipe) else ParallelSection()
        device = find_device(recipe.device, min(section.processes, ranks_per_node(section)))
        if device.type == "cpu":
            return "cpu"
        name = gpu_name(device)
        found = chip_called(name, memory_total(device), known_chips(self.more_chips))
        if found is None:
            raise UserError(
                f"{recipe.name} would run on this machine's {name}, which is none of the chips that are known; say one "
                "like it with --gpu, its processor with --gpu cpu, or describe it in a file for --chips"
            )
        return found

    def _said(self, stage: Stage) -> Callable[[str], str]:
        return lambda name: f"--{name}" if name in self.given else f"{stage.where}: {name}"

    def _here(self, recipe: Recipe, config: ModelConfig, fields: dict[str, Any]) -> StagePlan:
        """On this machine, as the run itself predicts it."""
        price = fields.pop("price", None)
        _check_fields(fields)
        if isinstance(recipe, PretrainRecipe | SFTRecipe) and recipe.parallel.processes > 1:
            raise UserError(
                f"{recipe.name} is for {recipe.parallel.processes} processes, and plans on this machine are of one; "
                "say their chips with --gpu"
            )
        if isinstance(recipe, RewardRecipe):
            return self._reward(recipe, config, price)
        if self.rehearse is not None:
            _rehearse(recipe, self.rehearse)
        if isinstance(recipe, RLRecipe):
            from rorqual.rl.rl_run import predict_rl

            return rl_predicted_here(recipe, config, predict_rl(recipe, config, self._prompt(recipe)), price)
        assert isinstance(recipe, PretrainRecipe | SFTRecipe)
        return predicted_here(recipe, config, predict(config, recipe), price)

    def _reward(self, recipe: RewardRecipe, config: ModelConfig, price: float | None) -> StagePlan:
        """Fine-tuning on pairs, after the sampling of those of [pairs]."""
        if self.rehearse is not None:
            raise UserError(f"--rehearse {self.rehearse}: {recipe.name} is a reward model; leave it out")
        start = self._tokenizer(recipe)
        rows, length = pair_sizes(recipe, None if start is None else tokenizer_at(start))
        sampling = 0.0
        if recipe.pairs is not None:
            path = Path(recipe.pairs.model)
            sampler = self.written.get(path) or ModelConfig.load(path)
            start = self.tokenizers.get(path, str(path))
            sampling = sampling_seconds(recipe, sampler, None if start is None else load_tokenizer(start))
        return predicted_here(recipe, config, predict_reward(config, recipe, rows, length), price, sampling)

    def _config(self, recipe: Recipe) -> ModelConfig:
        path = recipe.model.path
        if path is not None and Path(path) in self.written:
            return self.written[Path(path)]
        if isinstance(recipe, PretrainRecipe):
            return recipe_config(recipe)
        if isinstance(recipe, SFTRecipe | DistillRecipe) and path is None:
            source, data = recipe.tokenizer_path, recipe if isinstance(recipe, DistillRecipe) else recipe.data
            before = self.written.get(Path(source))
            size = before.vocab_size if before is not None else len(tokenizer_at(source))
            return model_config(recipe.model, size, length=data.sequence_length)
        return ModelConfig.load(trained_path(recipe.model))


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Raises UserError for what is said beside a recipe that is planned on this machine."""
    if fields:
        raise UserError(
            f"--{min(fields)}: a recipe on this machine is planned as it is; change it by key=value, or say another "
            "--gpu"
        )


def _rehearse(recipe: Recipe, steps: int) -> None:
    """Keeps what was measured, for this plan and later ones."""
    from rorqual.plan.rehearsal import keep_rehearsal

    def say(sentence: str) -> None:
        print(f"{recipe.name}, {sentence}", file=sys.stderr)

    if isinstance(recipe, RLRecipe):
        from rorqual.rl.rehearse import rehearse as rehearse_rl

        keep_rehearsal(recipe, rehearse_rl(recipe, steps, say))
    elif isinstance(recipe, PretrainRecipe | SFTRecipe):
        from rorqual.train.rehearse import rehearse

        keep_rehearsal(recipe, rehearse(recipe, steps, say))


def _kind_of(recipe: Recipe) -> str:
    return type(recipe).model_fields["kind"].default
