"""rorqual plan."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rorqual import strict_json
from rorqual.cli.options import AsJson, expand_path, within
from rorqual.errors import UserError

if TYPE_CHECKING:
    from rorqual.plan.stage import StagePlan

PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def number(option: str, text: str) -> float:
    """14.8T → 14.8e12. Raises UserError."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([KMBGT]?)", text.strip(), re.IGNORECASE)
    try:
        assert found
        value = float(found[1]) * PREFIXES[found[2].upper()]
    except (AssertionError, ValueError):
        raise UserError(f"{option} {text}: must be a number such as 14.8T, 300B or 1e9") from None
    if not 0 < value <= 1e18:
        raise UserError(f"{option} {text}: must be above 0 and at most 1e18")
    return value


OF_KIND = {  # options of some kinds alone
    "training": ("gpus", "precision", "tokens", "context", "batch", "moments", "days"),
    "rl": ("gpus", "precision", "steps", "questions", "samples", "lengths", "limit", "stale", "prompt", "weights"),
    "serve": ("users", "speed", "prompt", "answer", "hit", "weights", "accepted", "prices"),
}


def plan(
    context_of_options: typer.Context,
    what: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="a known model, a config.json or a model's directory")
    ] = None,
    kind: Annotated[str, typer.Option("--for", help="pretrain, sft, rl or serve")] = "pretrain",
    gpu: Annotated[str, typer.Option(help="the chip: h100, h800, b200, a100, rtx4090, …")] = "h100",
    gpus: Annotated[
        int | None, typer.Option(callback=within(1, 1 << 17), help="how many; default: the fewest that it fits on")
    ] = None,
    price: Annotated[
        float | None, typer.Option(callback=within(0, 10**6), help="$ an hour of a chip; default: the chip's own")
    ] = None,
    precision: Annotated[str, typer.Option(help="of products in training: fp8, bfloat16 or float32")] = "bfloat16",
    chips: Annotated[
        Path | None, typer.Option(metavar="FILE", help="more chips, as in src/rorqual/plan/chips.toml")
    ] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N", help="training: tokens, such as 14.8T")] = None,
    context: Annotated[int, typer.Option(callback=within(2, 1 << 20), help="training: tokens of a sequence")] = 4096,
    batch: Annotated[
        int | None,
        typer.Option(callback=within(1, 1 << 24), help="training: sequences of a step; default: by the run's compute"),
    ] = None,
    moments: Annotated[str, typer.Option(help="training: AdamW's, in float32, bfloat16 or 8bit")] = "float32",
    days: Annotated[
        float | None,
        typer.Option(callback=within(0, 10**5, above=True), help="training: the fewest chips that end within these"),
    ] = None,
    steps: Annotated[int | None, typer.Option(callback=within(1, 10**7), help="rl: rollouts of the run")] = None,
    questions: Annotated[int, typer.Option(callback=within(1, 10**6), help="rl: questions of a rollout")] = 32,
    samples: Annotated[int, typer.Option(callback=within(1, 10**6), help="rl: answers of a question")] = 16,
    lengths: Annotated[
        str, typer.Option(metavar="START:END", help="rl: mean tokens of an answer at the run's start and end")
    ] = "1000:4000",
    limit: Annotated[int, typer.Option(callback=within(1, 1 << 20), help="rl: most tokens of an answer")] = 8192,
    stale: Annotated[
        bool, typer.Option("--stale", help="rl: rollouts and training at the same time, on half of the chips each")
    ] = False,
    users: Annotated[
        float | None,
        typer.Option(callback=within(0, 10**9, above=True), help="serve: who read at the same time; default: who fit"),
    ] = None,
    speed: Annotated[
        float, typer.Option(callback=within(0, 10**4, above=True), help="serve: tokens/s that a user gets at least")
    ] = 20.0,
    prompt: Annotated[float, typer.Option(callback=within(1, 1 << 20), help="rl, serve: tokens of a prompt")] = 500.0,
    answer: Annotated[float, typer.Option(callback=within(1, 1 << 20), help="serve: tokens of an answer")] = 500.0,
    hit: Annotated[
        float, typer.Option(callback=within(0, 0.999), help="serve: share of a prompt that the prefix cache has")
    ] = 0.0,
    weights: Annotated[
        str | None,
        typer.Option(help="rl, serve: the engine's, in fp8, bfloat16 or int4; default: bfloat16 in rl, fp8 in serve"),
    ] = None,
    accepted: Annotated[
        float, typer.Option(callback=within(1, 100), help="serve: tokens a step, by speculative decoding")
    ] = 1.0,
    prices: Annotated[
        str | None, typer.Option(metavar="HIT:MISS:OUTPUT", help="serve: $ a million tokens that users pay")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="time small models on this machine, for the plans of its own runs")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict time, money and memory of a training, an RL run or a service before it starts."""
    from rorqual.plan.chips import PRECISIONS, find_chip
    from rorqual.plan.inference import SIZES
    from rorqual.plan.known_models import find_model
    from rorqual.plan.layout import MOMENTS
    from rorqual.plan.rl_plan import Tuning, plan_rl
    from rorqual.plan.serving_plan import Prices, Service, plan_serving
    from rorqual.plan.training_plan import Question, plan_training

    if calibrate:
        _calibrate()
        if what is None:
            return
    if what is None:
        raise UserError("say what to plan: a known model, a config.json or a model's directory; or --calibrate")
    _one_of("--for", kind, ("pretrain", "sft", "rl", "serve"))
    _check_kind(context_of_options, kind)
    _one_of("--precision", precision, PRECISIONS)
    _one_of("--moments", moments, tuple(MOMENTS))
    weights = weights or ("fp8" if kind == "serve" else "bfloat16")
    _one_of("--weights", weights, tuple(SIZES))
    config, chip = find_model(what), find_chip(gpu, expand_path(chips) if chips else None)
    if kind == "serve":
        paid = numbers("--prices", prices, 3) if prices is not None else None
        found = plan_serving(Service(
            config, chip, users, prompt, answer, hit, speed, weights, accepted=accepted, price=price,
            prices=Prices(*paid) if paid else None, name=what,
        ))  # fmt: skip
    elif kind == "rl":
        if steps is None or gpus is None:
            raise UserError("say how many rollouts the run has, and on how many chips, such as --steps 500 --gpus 8")
        start, end = numbers("--lengths", lengths, 2)
        found = plan_rl(Tuning(
            config, chip, gpus, steps, questions, samples, prompt, (start, end), limit, stale=stale,
            precision=precision, weights=weights, price=price, name=what,
        ))  # fmt: skip
    else:
        if tokens is None:
            raise UserError("say on how many tokens it is trained, such as --tokens 14.8T")
        found = plan_training(Question(
            config, chip, number("--tokens", tokens), gpus, context, batch, precision, moments, price, days, kind=kind,
            name=what,
        ))  # fmt: skip
    if as_json:
        print(strict_json.dumps(found.to_dict()))
    else:
        show(found)


def _check_kind(options: typer.Context, kind: str) -> None:
    """Raises UserError for an option that this kind does not read."""
    own = OF_KIND["training" if kind in ("pretrain", "sft") else kind]
    for name in {name for names in OF_KIND.values() for name in names}.difference(own):
        if (source := options.get_parameter_source(name)) is not None and source.name == "COMMANDLINE":
            kinds = [k for k, names in OF_KIND.items() if name in names]
            raise UserError(f"--{name} is for {' and '.join(kinds)}, not for --for {kind}; leave it out")


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


def numbers(option: str, text: str, count: int) -> list[float]:
    """1000:4000 → [1000.0, 4000.0]. Raises UserError."""
    parts = text.split(":")
    if len(parts) != count:
        raise UserError(f"{option} {text}: must be {count} numbers with : between")
    return [number(option, part) for part in parts]


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{option} {value}: must be one of {', '.join(known)}")


def show(plan: "StagePlan") -> None:
    """As tables on the terminal."""
    from rich.console import Console

    from rorqual.plan.plan_text import tables

    console = Console(soft_wrap=False, highlight=False)
    for part in tables(plan):
        console.print(part)
