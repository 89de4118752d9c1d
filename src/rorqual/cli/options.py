"""Options that several commands share, and their checks."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from rorqual.errors import UserError
from rorqual.local_paths import local_path

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="the run's recipe; see recipes/")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value …]", help="override recipe fields")]
Resume = Annotated[bool, typer.Option("--resume", help="continue the run from its newest checkpoint")]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="local|auto|HOST:PORT",
        help="sample rollouts on Ray: started on this machine, the cluster it belongs to, or the one at HOST:PORT; "
        "default: in this process",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="print the plan (parameters, FLOPs, memory, time) and stop; "
        "of rl, and of distill from worked solutions, also the first prompt",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]


def within(least: float, most: float, above: bool = False) -> Any:
    """An option's callback that raises UserError outside [least, most], or (least, most] with `above`."""

    def check(option: typer.CallbackParam, value: float | None) -> float | None:
        if value is not None and not (least < value <= most if above else least <= value <= most):
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            limits = f"above {least} and at most {most}" if above else f"from {least} to {most}"
            raise UserError(f"{option.opts[0]} {shown}: must be {limits}")
        return value

    return check


NO_LIMIT = 10**12  # for counts without a limit of their own: tokens, problems
SEEDS = -(2**63), 2**63 - 1
Temperature = Annotated[
    float | None, typer.Option(callback=within(0, 100), help="0 is greedy; default: the model's own, else 0.6")
]
TopP = Annotated[
    float | None,
    typer.Option(
        callback=within(0, 1, above=True), help="top-p (nucleus) sampling; default: the model's own, else 0.95"
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(callback=within(1, NO_LIMIT), help="maximum tokens to generate; default: the model's own, else 512"),
]
ThinkingBudget = Annotated[
    int | None, typer.Option(callback=within(0, NO_LIMIT), help="maximum tokens of thinking, then </think> is inserted")
]
Weights = Annotated[
    str | None, typer.Option(help="quantise the weights to int4, int8 or fp8 while loading; fp8 keeps an FP8 release")
]
Adapter = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="merge a LoRA adapter (peft's layout, or a run's) into the model on loading"),
]
Speculative = Annotated[
    str,
    typer.Option(
        help="speculative decoding: ngram (prompt lookup), mtp (the model's multi-token module) or none; "
        "auto: ngram where weights are quantised"
    ),
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, or auto: the fastest on this machine")]
DEVICES = ("cpu", "cuda")
ModelDir = Annotated[
    str, typer.Argument(metavar="MODEL", help="a Hugging Face directory, a run's folder or a .gguf file")
]


def find_adapted(model: str, adapter: Path | None) -> tuple[Path, Path | None]:
    """A model as `find_model` finds it, and the directory of an adapter for it, if any: `adapter`, or `model` itself
    where it holds an adapter alone, whose base then is the model.

    Raises UserError if there is no such model or adapter.
    """
    from rorqual.adapters.peft_files import base_of, is_adapter
    from rorqual.model.model_directory import is_gguf

    given = expand_path(Path(model))
    if adapter is None and not is_gguf(given) and is_adapter(given):
        return find_model(base_of(given)), given
    return find_model(model), adapter and find_adapter(adapter)


def find_adapter(path: Path) -> Path:
    """An adapter's directory, for a run's folder that of the run. Raises UserError if it holds none."""
    path = expand_path(path)
    for found in (path, path / "adapter"):
        if (found / "adapter_config.json").exists():
            return found
    raise UserError(f"{path} is not an adapter: no adapter_config.json in it; give a directory that peft wrote")


def find_model(model: str) -> Path:
    """A model's directory or .gguf file, for a run's folder the model in it, for a Hub id its snapshot.

    Raises UserError if there is no such model.
    """
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
    except Exception as e:  # any error of the network or the Hub
        raise UserError(
            f"{model} is not a directory, and cannot be downloaded from the Hub ({type(e).__name__}); check the name "
            "and the network"
        ) from e


def expand_path(path: Path) -> Path:
    """Expand ~ and variables that the shell has not, as in --out=~/run."""
    return Path(local_path(str(path)))


def served_name(model: Path) -> str:
    """The default model name in the API: a run's name, or a file's without .gguf."""
    from rorqual.model.model_directory import is_gguf

    path = model.resolve()
    path = path.parent if path.name == "model" else path
    return path.stem if is_gguf(path) else path.name


def check_adapters(given: str | None, served: str) -> dict[str, Path]:
    """The directories of --adapters, by name. served: the model's own name. Raises UserError for an invalid one."""
    found: dict[str, Path] = {}
    for part in [] if given is None else given.split(","):
        name, sign, path = (piece.strip() for piece in part.partition("="))
        if not (sign and name and path and name.isprintable()):
            raise UserError(f"--adapters {part!r}: must be NAME=DIR, with commas between several")
        if name in found or name == served:
            raise UserError(f"--adapters {part!r}: the name {name} is taken; choose another, or --name for the model")
        found[name] = find_adapter(Path(path))
    return found


def check_weights(weights: str | None) -> Any:
    if weights is not None:
        check_choice("--weights", weights, ("int4", "int8", "fp8"))
    return weights


def check_dtype(name: str, device: str) -> Any:
    """The torch.dtype of --dtype on --device. Raises UserError for invalid values."""
    check_choice("--dtype", name, ("auto", "float32", "bfloat16"))
    check_choice("--device", device, DEVICES)
    from rorqual.kernels.dtypes import compute_dtype

    return compute_dtype(name, device)


def check_kv_cache_dtype(name: str) -> Any:
    """The torch.dtype of --kv-cache-dtype; None for auto. Raises UserError for an invalid name."""
    check_choice("--kv-cache-dtype", name, ("auto", "bfloat16", "float32", "int8", "fp8"))
    import torch

    return None if name == "auto" else getattr(torch, {"fp8": "float8_e4m3fn"}.get(name, name))


def check_speculative(method: str) -> Any:
    check_choice("--speculative", method, ("auto", "ngram", "mtp", "none"))
    return None if method == "none" else method


def check_ray(address: str | None) -> None:
    if address is not None and not re.fullmatch(r"local|auto|[^\s:/]+:\d{1,5}", address):
        raise UserError(f"--ray {address!r}: must be local, auto or HOST:PORT")


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{option} {value!r}: must be one of {', '.join(allowed)}")
