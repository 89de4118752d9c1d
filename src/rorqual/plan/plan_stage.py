"""The plan of a stage as it is asked for."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.plan.calibrations import HERE
from rorqual.plan.chips import Chip, find_chip
from rorqual.plan.known_models import find_model
from rorqual.plan.layout import Layout
from rorqual.plan.optimal import largest_within, sized, tokens_within
from rorqual.plan.request import DistillRequest, Request, RLRequest, SamplingRequest, ServeRequest, TrainingRequest
from rorqual.plan.rl_plan import Tuning, plan_rl
from rorqual.plan.sampling_plan import Sampling, plan_distillation, plan_sampling
from rorqual.plan.serving_plan import Prices, Service, plan_serving
from rorqual.plan.stage import StagePlan
from rorqual.plan.training_plan import Question, plan_training

START = 1e9  # tokens from which the search for as many as a budget pays starts


def plan_stage(
    request: Request, before: ModelConfig | None = None, more_chips: Path | None = None, layout: Layout | None = None,
    written: Mapping[Path, ModelConfig] | None = None,
) -> StagePlan:  # fmt: skip
    """The plan of one stage. Raises UserError.

    before: the model of the stage before, which one without a model of its own goes on with; layout: of a recipe;
    written: directories of models that stages before will write.
    """
    chip, written = find_chip(request.gpu, more_chips), written or {}
    if chip.family == HERE and request.gpus not in (None, 1):
        raise UserError(f"--gpus {request.gpus}: cpu is one machine, this one; leave it out")
    config = _model(request.model, written) if request.model is not None else before
    if isinstance(request, TrainingRequest):
        return _training(request, config, chip, layout)
    if config is None:
        raise UserError("say what to plan: a known model, a config.json, a model's directory or a recipe")
    if isinstance(request, RLRequest):
        return _rl(request, config, chip)
    if isinstance(request, ServeRequest):
        return _serving(request, config, chip)
    assert isinstance(request, SamplingRequest)
    writer = _model(request.teacher or "", written) if isinstance(request, DistillRequest) else config
    return _sampling(request, config, writer, chip)


def _model(what: str, written: Mapping[Path, ModelConfig]) -> ModelConfig:
    return written.get(Path(what)) or find_model(what)


def _name(request: Request) -> str:
    return request.name or request.model or ""


def _training(request: TrainingRequest, config: ModelConfig | None, chip: Chip, layout: Layout | None) -> StagePlan:
    if layout is not None:
        if request.gpus != layout.chips:
            raise UserError(
                f"--gpus {request.gpus}: the recipe's [parallel] is for {layout.chips} processes; change it by "
                "parallel.data=…, or leave --gpus out"
            )
        layout = replace(layout, precision=request.precision)
    asked = Question(
        config or sized(request.shape, 1), chip, request.tokens or START, request.gpus, request.context, request.batch,
        request.precision, request.moments, request.price, request.days, request.imbalance, request.kind,
        _name(request), layout,
    )  # fmt: skip
    if config is None:
        if request.tokens is not None:
            raise UserError("say which model is trained, or leave out --tokens for the largest that --budget pays")
        return largest_within(asked, request.shape, request.budget)
    return plan_training(asked) if request.tokens is not None else tokens_within(asked, request.budget)


def _rl(request: RLRequest, config: ModelConfig, chip: Chip) -> StagePlan:
    assert request.steps is not None
    return plan_rl(Tuning(
        config, chip, request.gpus or 1, request.steps, request.questions, request.samples, request.prompt,
        request.lengths, request.limit, stale=request.stale, precision=request.precision, weights=request.weights,
        price=request.price, name=_name(request),
    ))  # fmt: skip


def _serving(request: ServeRequest, config: ModelConfig, chip: Chip) -> StagePlan:
    return plan_serving(Service(
        config, chip, request.users, request.prompt, request.answer, request.hit, request.speed, request.weights,
        accepted=request.accepted, price=request.price, prices=Prices(*request.prices) if request.prices else None,
        name=_name(request),
    ))  # fmt: skip


def _sampling(request: SamplingRequest, config: ModelConfig, writer: ModelConfig, chip: Chip) -> StagePlan:
    asked = Sampling(
        writer, chip, request.problems, request.samples, request.gpus, request.prompt, request.answer, request.limit,
        request.weights, request.price, _name(request),
    )  # fmt: skip
    if not isinstance(request, DistillRequest):
        return plan_sampling(asked)
    length = 1 << max(8, round(request.prompt + request.answer - 1).bit_length())
    student = Question(
        config, chip, 1.0, request.gpus, length, precision=request.precision, price=request.price, name=_name(request)
    )
    return plan_distillation(asked, student, request.keep, request.correct, request.epochs)
