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


def plan(
    what: Annotated[str, typer.Argument(metavar="MODEL", help="a known model, a config.json or a model's directory")],
    gpu: Annotated[str, typer.Option(help="the chip: h100, h800, b200, a100, rtx4090, …")] = "h100",
    gpus: Annotated[
        int | None, typer.Option(callback=within(1, 1 << 17), help="how many; default: the fewest that it fits on")
    ] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N", help="to train on, such as 14.8T")] = None,
    context: Annotated[int, typer.Option(callback=within(2, 1 << 20), help="tokens of a sequence")] = 4096,
    batch: Annotated[
        int | None, typer.Option(callback=within(1, 1 << 24), help="sequences of a step; default: by the run's compute")
    ] = None,
    precision: Annotated[str, typer.Option(help="of products: fp8, bfloat16 or float32")] = "bfloat16",
    moments: Annotated[str, typer.Option(help="of AdamW: float32, bfloat16 or 8bit")] = "float32",
    price: Annotated[
        float | None, typer.Option(callback=within(0, 10**6), help="$ an hour of a chip; default: the chip's own")
    ] = None,
    days: Annotated[
        float | None, typer.Option(callback=within(0, 10**5, above=True), help="the fewest chips that end within these")
    ] = None,
    chips: Annotated[
        Path | None, typer.Option(metavar="FILE", help="more chips, as in rorqual/plan/chips.toml")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict time, money, memory and the best layout of a training before it starts."""
    from rorqual.plan.chips import PRECISIONS, find_chip
    from rorqual.plan.known_models import find_model
    from rorqual.plan.layout import MOMENTS
    from rorqual.plan.training_plan import Question, plan_training

    _one_of("--precision", precision, PRECISIONS)
    _one_of("--moments", moments, tuple(MOMENTS))
    if tokens is None:
        raise UserError("say on how many tokens it is trained, such as --tokens 14.8T")
    asked = Question(
        config=find_model(what),
        chip=find_chip(gpu, expand_path(chips) if chips else None),
        tokens=number("--tokens", tokens),
        chips=gpus,
        length=context,
        batch=batch,
        precision=precision,
        moments=moments,
        price=price,
        days=days,
        name=what,
    )
    found = plan_training(asked)
    if as_json:
        print(strict_json.dumps(found.to_dict()))
    else:
        show(found)


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
