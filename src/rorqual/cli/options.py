"""Options that several commands share, and their checks."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rorqual.errors import UserError
from rorqual.local_paths import local_path

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="what to do; see recipes/")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value …]", help="override recipe fields")]
Resume = Annotated[bool, typer.Option("--resume", help="continue the run where its newest checkpoint stands")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan (parameters, FLOPs, memory, time) and stop")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]


def within(least: float, most: float, above: bool = False) -> Any:
    """A callback for an option: a number from `least` (above: not that itself) to `most`, else UserError."""

    def check(option: typer.CallbackParam, value: float | None) -> float | None:
        if value is not None and not (least < value <= most if above else least <= value <= most):
            said = f"{value:g}" if isinstance(value, float) else str(value)
            limits = f"above {least} and at most {most}" if above else f"from {least} to {most}"
            raise UserError(f"{option.opts[0]} {said}: must be {limits}")
        return value

    return check


MOST = 10**12  # of what has no end of its own: tokens, problems
SEEDS = -(2**63), 2**63 - 1
Temperature = Annotated[
    float | None, typer.Option(callback=within(0, 100), help="0 is greedy; default: the model's own, else 0.6")
]
TopP = Annotated[
    float | None,
    typer.Option(
        callback=within(0, 1, above=True), help="nucleus kept when sampling; default: the model's own, else 0.95"
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(callback=within(1, MOST), help="tokens to make at most; default: the model's own, else 512"),
]
ThinkingBudget = Annotated[
    int | None, typer.Option(callback=within(0, MOST), help="close </think> after so many tokens")
]
Weights = Annotated[str | None, typer.Option(help="pack the weights into int4 or int8 while loading")]
Speculative = Annotated[
    str,
    typer.Option(
        help="speculative decoding: ngram (prompt lookup), mtp (the model's multi-token module) or none; "
        "auto: ngram where weights are packed"
    ),
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine computes fastest")]
DEVICES = ("cpu", "cuda")
ModelDir = Annotated[
    str, typer.Argument(metavar="MODEL", help="a Hugging Face directory, a run's folder or a .gguf file")
]


def find_model(model: str) -> Path:
    """A model's directory or .gguf file; a run's folder stands for the model in it, a Hub id for its snapshot."""
    from rorqual.model.model_directory import is_gguf, model_directory, unreadable

    path = expand_path(Path(model))
    if is_gguf(path):
        return path
    if os.path.lexists((found := model_directory(path)) / "config.json"):
        return found
    try:
        if path.is_dir():
            os.listdir(path)
    except OSError as e:
        raise unreadable(path, e) from None
    if path.exists() or path.is_absolute() or model.count("/") != 1:
        raise UserError(f"{model} is not a model: no config.json in it; give a Hugging Face directory or a Hub id")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as e:  # whatever the network or the Hub says
        raise UserError(
            f"{model} is neither a directory nor to be had from the Hub ({type(e).__name__}); check the name and the "
            "network"
        ) from e


def expand_path(path: Path) -> Path:
    """A home and variables that a shell has left in it, as in --out=~/run."""
    return Path(local_path(str(path)))


def served_name(model: Path) -> str:
    """What clients call what a user has named: a run by the run's name, a file without .gguf."""
    from rorqual.model.model_directory import is_gguf

    path = model.resolve()
    path = path.parent if path.name == "model" else path
    return path.stem if is_gguf(path) else path.name


def check_weights(weights: str | None) -> Any:
    if weights is not None:
        check_choice("--weights", weights, ("int4", "int8"))
    return weights


def check_dtype(name: str, device: str) -> Any:
    """The torch.dtype of --dtype on --device, both checked."""
    check_choice("--dtype", name, ("auto", "float32", "bfloat16"))
    check_choice("--device", device, DEVICES)
    from rorqual.kernels.dtypes import compute_dtype

    return compute_dtype(name, device)


def check_speculative(way: str) -> Any:
    check_choice("--speculative", way, ("auto", "ngram", "mtp", "none"))
    return None if way == "none" else way


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{option} {value!r}: must be one of {', '.join(allowed)}")
