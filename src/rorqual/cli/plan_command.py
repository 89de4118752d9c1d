"""rorqual plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual import strict_json
from rorqual.cli.options import AsJson, expand_path
from rorqual.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rorqual.plan.pipeline_plan import PipelinePlan
    from rorqual.plan.stage import StagePlan

# Options that say what is asked: fields of the requests in plan/request.py, which has their defaults and bounds.
ASKED = (
    "gpu", "gpus", "price", "precision", "tokens", "budget", "days", "shape", "context", "batch", "moments",
    "imbalance", "steps", "questions", "samples", "lengths", "limit", "stale", "problems", "teacher", "keep",
    "correct", "epochs", "users", "speed", "prompt", "answer", "hit", "weights", "accepted", "prices",
)  # fmt: skip


def plan(
    options: typer.Context,
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL | RECIPE.toml [key=value …] …]",
            help="a known model, a config.json or a model's directory; or recipes, or the stages of a pipeline's file",
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--for", help="pretrain (default), sft, rl, distill, eval or serve")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="the chip: h100, h800, b200, a100, …, or cpu: this machine; default: h100")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="how many; default: the fewest that it fits on")] = None,
    price: Annotated[float | None, typer.Option(help="$ an hour of a chip; default: the chip's own")] = None,
    chips: Annotated[
        Path | None, typer.Option(metavar="FILE", help="more chips, as in src/rorqual/plan/chips.toml")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="of products in training: fp8, bfloat16 (default) or float32")
    ] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N", help="training: tokens, such as 14.8T")] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="$", help="training: as many tokens as it pays; without MODEL, also which one"),
    ] = None,
    days: Annotated[
        float | None, typer.Option(help="training: the fewest chips that end within these; or as --budget")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="training without MODEL: dense (default) or mixture, of the one to find")
    ] = None,
    context: Annotated[int | None, typer.Option(help="training: tokens of a sequence; default: 4096")] = None,
    batch: Annotated[
        int | None, typer.Option(help="training: sequences of a step; default: by the run's compute")
    ] = None,
    moments: Annotated[
        str | None, typer.Option(help="training: AdamW's, in float32 (default), bfloat16 or 8bit")
    ] = None,
    imbalance: Annotated[
        float | None, typer.Option(help="training: by how much the busiest expert is above the mean; default: 0.2")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="rl: rollouts of the run")] = None,
    questions: Annotated[int | None, typer.Option(help="rl: questions of a rollout; default: 32")] = None,
    samples: Annotated[int | None, typer.Option(help="rl, distill, eval: answers of a question; default: 16")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="START:END", help="rl: mean tokens of an answer at the run's start and end; default: 1000:4000"
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="rl, distill, eval: most tokens of an answer; default: 8192")
    ] = None,
    stale: Annotated[
        bool | None,
        typer.Option("--stale", help="rl: rollouts and training at once, on half of the chips each"),
    ] = None,
    problems: Annotated[
        str | None, typer.Option(metavar="N", help="distill, eval: problems that are answered; default: 1000")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="distill: whose answers MODEL learns from")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(help="distill: answers of a problem that are trained on, at most; default: 1")
    ] = None,
    correct: Annotated[
        float | None, typer.Option(help="distill: share of the problems with a correct answer; default: 1")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="distill: over the answers; default: 2")] = None,
    users: Annotated[
        float | None, typer.Option(help="serve: who read at the same time; default: as many as fit")
    ] = None,
    speed: Annotated[float | None, typer.Option(help="serve: tokens/s that a user gets at least; default: 20")] = None,
    prompt: Annotated[
        float | None, typer.Option(help="rl, distill, eval, serve: tokens of a prompt; default: 500")
    ] = None,
    answer: Annotated[
        float | None, typer.Option(help="distill, eval, serve: tokens of an answer, on average; default: 500")
    ] = None,
    hit: Annotated[
        float | None, typer.Option(help="serve: share of a prompt that the prefix cache has; default: 0")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="rl, distill, eval, serve: the engine's, in fp8, bfloat16 or int4; default: bfloat16, serve: fp8"
        ),
    ] = None,
    accepted: Annotated[
        float | None, typer.Option(help="serve: tokens a step, by speculative decoding; default: 1")
    ] = None,
    prices: Annotated[
        str | None, typer.Option(metavar="HIT:MISS:OUTPUT", help="serve: $ a million tokens that users pay")
    ] = None,
    rehearse: Annotated[
        int | None, typer.Option(metavar="STEPS", help="a recipe on this machine: run its first steps, to measure them")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="time small models on this machine, for the plans of its own runs")
    ] = False,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="also write an HTML page with pictures")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict time, money and memory of a training, an RL run, a service or a whole pipeline before it starts."""
    from rorqual.plan.plan_text import pipeline_tables, tables
    from rorqual.plan.stage import StagePlan

    if calibrate:
        _calibrate()
        if not what:
            return
    given = {name: options.params[name] for name in ASKED if options.params[name] is not None}
    found = _planned(what or [], kind, given, expand_path(chips) if chips else None, rehearse)
    if page is not None:
        _write_page(expand_path(page), found)
    if as_json:
        print(strict_json.dumps(found.to_dict()))
        return
    _show(tables(found) if isinstance(found, StagePlan) else pipeline_tables(found))
    if page is not None:
        print(page)


def show_plan(words: list[str], out: Path | None = None, seed: int | None = None) -> None:
    """Print the tables of a pipeline's file, run in `out` with `seed`, or of a recipe with its overrides.

    Raises UserError.
    """
    from rorqual.cli.plan_stages import plan_files
    from rorqual.plan.plan_text import pipeline_tables, tables
    from rorqual.plan.stage import StagePlan

    found = plan_files(words, {}, None, out=out, seed=seed)
    _show(tables(found) if isinstance(found, StagePlan) else pipeline_tables(found))


def _planned(
    what: list[str], kind: str | None, given: dict[str, Any], more_chips: Path | None, rehearse: int | None
) -> "StagePlan | PipelinePlan":
    if what and what[0].endswith(".toml"):
        from rorqual.cli.plan_stages import plan_files

        if kind is not None:
            raise UserError(f"--for {kind}: a recipe says itself what it is for; leave it out")
        return plan_files(what, given, more_chips, rehearse)
    if rehearse is not None:
        raise UserError(f"--rehearse {rehearse}: a recipe's steps are rehearsed; give a recipe")
    from rorqual.plan.plan_stage import plan_stage
    from rorqual.plan.request import parse_request

    if len(what) > 1:
        raise UserError(f"{what[1]}: one model is planned at a time; several stages are recipes, or a pipeline's file")
    fields = given | ({"model": what[0]} if what else {})
    return plan_stage(parse_request(kind or "pretrain", fields, lambda name: f"--{name}"), more_chips=more_chips)


def _calibrate() -> None:
    from rorqual.engine.calibrate import calibrate_engine
    from rorqual.kernels.dtypes import compute_dtype
    from rorqual.plan.cpu_time import keep
    from rorqual.plan.engine_time import keep_engine_costs
    from rorqual.train.calibrate import calibrate

    dtype, costs = compute_dtype("auto"), calibrate()
    keep(costs, dtype)
    factors = {"training": costs.interval(1.0)[1]}
    for name, fp8 in (("the engine", False), ("the engine with FP8 weights", True)):
        found = calibrate_engine(fp8=fp8)
        path = keep_engine_costs(found, dtype, fp8)
        factors[name] = found.interval(1.0)[1]
    said = ", ".join(f"{factor:.2f} ({name})" for name, factor in factors.items())
    print(f"{path}: {costs.source}; 80 % of times within a factor of {said}")


def _write_page(path: Path, plan: "StagePlan | PipelinePlan") -> None:
    """Raises UserError where it cannot be written."""
    from rorqual.files import write_text
    from rorqual.plan.pipeline_plan import PipelinePlan
    from rorqual.report.plan_page import plan_page

    stages = plan.stages if isinstance(plan, PipelinePlan) else [plan]
    write_text(path, plan_page(f"Plan: {plan.name or 'a model'}", stages))


def _show(parts: "list[RenderableType]") -> None:
    from rorqual.console import output

    console = output()
    for part in parts:
        console.print(part)
