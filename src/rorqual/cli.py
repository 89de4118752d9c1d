"""The front door: one verb, one function.

Heavy imports stay inside the verbs, so that `--help` and a mistyped word answer at once.
"""

import io
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from rorqual import strict_json
from rorqual.errors import Stopped, UserError, file_error
from rorqual.paths import local_path
from rorqual.process import tune

app = typer.Typer(
    help="Train, sharpen and serve DeepSeek-style reasoning models on the hardware you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

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
Speculate = Annotated[
    str,
    typer.Option(
        help="check guesses together: lookup (what came before), mtp (the model's multi-token module) or none; "
        "auto: lookup where weights are packed"
    ),
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine computes fastest")]
DEVICES = ("cpu", "cuda")
ModelDir = Annotated[
    str, typer.Argument(metavar="MODEL", help="a Hugging Face directory, a run's folder or a .gguf file")
]


def main() -> None:
    """Run the command line; every mistake of the user's ends in one sentence and a non-zero exit."""
    tune()
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal's encoding lacks is no reason to stop
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except UserError as e:
        print(f"rorqual: {e}", file=sys.stderr)
        sys.exit(2)
    except Stopped as e:
        print(f"rorqual: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        print(f"rorqual: {file_error(e.filename or 'a file', e, 'used')}", file=sys.stderr)
        sys.exit(2)


@app.command()
def pretrain(recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Train a model from text."""
    from rorqual.train.pretrain import pretrain as run

    _train("pretrain", run, recipe, overrides, resume, dry_run)


@app.command()
def sft(recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Fine-tune a model on conversations, with the loss on the assistant's turns."""
    from rorqual.train.sft import sft as run

    _train("sft", run, recipe, overrides, resume, dry_run)


def _train(kind: str, run: Any, path: Path, overrides: list[str] | None, resume: bool, dry: bool) -> None:
    from rorqual.plan.estimate import plan_text
    from rorqual.recipe import load_recipe
    from rorqual.train.dry_run import dry_run

    recipe = load_recipe(path, kind, overrides)
    if dry:
        print(plan_text(dry_run(recipe)))
        return
    _finished(run(recipe, resume=resume))


@app.command()
def rl(recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Sharpen a model by reinforcement learning on checkable problems (GRPO)."""
    from rorqual.kernels.machine import compute_dtype, dtype_name
    from rorqual.model import ModelConfig
    from rorqual.plan.cost import memory, parameters
    from rorqual.reason.environment import open_environment
    from rorqual.reason.rl import check_problems, predict_rl
    from rorqual.reason.rl import rl as run
    from rorqual.recipe import load_recipe
    from rorqual.train.prepare import check_model, tokenizer_of

    checked = load_recipe(recipe, "rl", overrides)
    if dry_run:
        tokenizer = tokenizer_of(checked.model)
        check_model(checked.model)
        check_problems(checked, tokenizer, [open_environment(section) for section in checked.environments])
        config = ModelConfig.load(checked.model.path)
        total, active = parameters(config)
        dtype = dtype_name(compute_dtype(checked.model.dtype))
        needed = memory(config, checked.grpo.micro_tokens, dtype=dtype, optimizer=checked.optimizer.name, ema=False)
        print(f"{'parameters':<12} {total:.4g} in all, {active:.4g} active a token")
        print(f"{'memory':<12} about {needed.total / 1e9:.3g} GB in training, without the cache of rollouts")
        for name, value in predict_rl(checked, config).items():
            print(f"{name:<12} {'by the clock' if value is None else f'at most {value:.3g}'}")
        return
    _finished(run(checked, resume=resume))


@app.command()
def distill(recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Sample a teacher, keep the best answers, fine-tune a student on them."""
    from rorqual.reason.rejection import distill as run
    from rorqual.recipe import load_recipe

    _finished(run(load_recipe(recipe, "distill", overrides), resume=resume))


def _finished(run_dir: Path) -> None:
    from rorqual.report import write_report

    print(f"{run_dir}: done; the model is in {_model_in(run_dir)}, the report in {write_report(run_dir)}")


def _model_in(run_dir: Path) -> Path:
    from rorqual.model.files import model_directory

    return model_directory(run_dir)


@app.command("eval")
def evaluate(
    model: ModelDir,
    tasks: Annotated[
        str,
        typer.Option(
            help="comma-separated: reasoning-gym datasets, files of questions and answers, an rl recipe, humaneval"
        ),
    ],
    samples: Annotated[int, typer.Option(callback=within(1, 10**6), help="answers a problem")] = 8,
    problems: Annotated[
        int,
        typer.Option(
            callback=within(1, MOST),
            help="problems a task: from the held-out split, or of a file, all if it has no more",
        ),
    ] = 200,
    template: Annotated[str, typer.Option(help="chat, r1-zero or plain")] = "chat",
    temperature: Annotated[float, typer.Option(callback=within(0, 100), help="of sampling")] = 0.6,
    top_p: Annotated[float, typer.Option(callback=within(0, 1, above=True), help="nucleus kept when sampling")] = 0.95,
    max_tokens: Annotated[int, typer.Option(callback=within(1, MOST), help="tokens an answer at most")] = 1024,
    thinking_budget: ThinkingBudget = None,
    seed: Annotated[int, typer.Option(callback=within(*SEEDS), help="of problems and sampling")] = 0,
    against: Annotated[str | None, typer.Option(help="another model: the gain over it, problem by problem")] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """pass@1 and cons@k on held-out problems, with 95 % intervals.

    A file (.jsonl, .jsonl.gz, .json, .parquet) is asked whole; of a recipe's environments only what training left out.
    """
    from rich.console import Console

    from rorqual.engine import Engine
    from rorqual.evals.run import compare, gains_table, sampling_params, table
    from rorqual.evals.run import evaluate as run
    from rorqual.evals.tasks import open_task, split_tasks

    _choice("--template", template, ("chat", "r1-zero", "plain"))
    settings: dict[str, Any] = {
        "seed": seed, "template": template, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens,
        "thinking_budget": thinking_budget,
    }  # fmt: skip
    sampling_params(samples, problems, **settings)
    opened = [open_task(task) for task in split_tasks(tasks)]
    computed = _dtype(dtype, device)
    directories = [_directory(model), *([] if against is None else [_directory(against)])]
    results = []
    for directory in directories:
        try:
            engine = Engine(directory, dtype=computed, device=device)
            result = run(engine, engine.tokenizer, opened, samples, problems, **settings)
        except UserError:
            if results and as_json:  # what the first model took hours for is not lost with the second
                print(strict_json.dumps(results[0]))
            raise
        results.append(result | {"model": str(directory)})
        if not as_json:
            Console().print(table(results[-1]))
        del engine  # before the other model is loaded
    if against is not None:
        results[0] |= {"against": results[1], "gains": compare(results[1], results[0])}
    if as_json:
        print(strict_json.dumps(results[0]))
    elif against is not None:
        Console().print(gains_table(results[0]["gains"]))


@app.command()
def generate(
    model: ModelDir,
    prompt: Annotated[str, typer.Argument(help="the text to continue, in the chat template; -: standard input")] = "-",
    raw: Annotated[bool, typer.Option("--raw", help="continue the text as it is, without chat template")] = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    thinking_budget: ThinkingBudget = None,
    seed: Annotated[int | None, typer.Option(callback=within(*SEEDS), help="the same seed gives the same text")] = None,
    weights: Weights = None,
    dtype: Dtype = "auto",
    speculate: Speculate = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Continue a prompt once; --json adds tokens and timings."""
    from rorqual.engine import Engine
    from rorqual.engine.recommended import recommended
    from rorqual.terminal import loading, read_prompt, templated, timed

    bits, way, computed = _bits(weights), _way(speculate), _dtype(dtype, device)
    directory = _directory(model)
    params = recommended(
        directory, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed,
        thinking_budget=thinking_budget,
    )  # fmt: skip
    said = read_prompt(prompt)
    started = time.monotonic()
    with loading(directory):
        engine = Engine(directory, weights=bits, dtype=computed, speculate=way, device=device)
    loaded = time.monotonic()
    asked = [{"role": "user", "content": said.rstrip("\n")}]
    tokens = engine.encode(said) if raw else engine.encode(templated(engine, asked), begin=False)
    if as_json:
        found = timed(engine, tokens, params) | {"load_seconds": loaded - started}
        print(strict_json.dumps(found, ensure_ascii=False))
        return
    for piece in engine.stream(tokens, params):
        print(piece, end="", flush=True)
    print()


@app.command()
def chat(
    model: ModelDir,
    system: Annotated[str | None, typer.Option(help="what to tell the model before the conversation")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    thinking_budget: ThinkingBudget = None,
    weights: Weights = None,
    dtype: Dtype = "auto",
    speculate: Speculate = "auto",
    device: Device = "cpu",
) -> None:
    """Talk to a model; Ctrl-C stops a reply, Ctrl-D ends."""
    from rorqual.engine import Engine
    from rorqual.engine.recommended import recommended
    from rorqual.terminal import loading, talk

    bits, way, computed = _bits(weights), _way(speculate), _dtype(dtype, device)
    directory = _directory(model)
    params = recommended(
        directory, temperature=temperature, top_p=top_p, max_tokens=max_tokens, thinking_budget=thinking_budget
    )
    with loading(directory):  # a turn need not read the conversation again, and Ctrl-C waits for a piece of it only
        engine = Engine(
            directory, prefix_cache=True, chunk=512, weights=bits, dtype=computed, speculate=way, device=device
        )
    talk(engine, params, system)


@app.command()
def serve(
    model: ModelDir,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(callback=within(0, 65535), help="port to listen on; 0 takes a free one")] = 8000,
    name: Annotated[str | None, typer.Option(help="what clients call the model; default: the directory's name")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="a file of keys, one a line; else RORQUAL_API_KEYS")] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="https://…: pages there may use the server, and it may be asked by that name; repeat for more"
        ),
    ] = None,
    anonymous: Annotated[bool, typer.Option("--anonymous", help="listen on a public address without keys")] = False,
    slots: Annotated[int, typer.Option(callback=within(1, 10_000), help="sequences at a time")] = 64,
    cache_gb: Annotated[
        float, typer.Option(callback=within(0, 10**6, above=True), help="memory for the past of all sequences, in GiB")
    ] = 1.0,
    waiting: Annotated[int, typer.Option(callback=within(0, 10**6), help="sequences that may wait; beyond, 429")] = 256,
    timeout: Annotated[
        float, typer.Option(callback=within(0, 10**6, above=True), help="seconds a request may take")
    ] = 600.0,
    dtype: Dtype = "auto",
    weights: Weights = None,
    cache_format: Annotated[
        str | None, typer.Option(help="int8: half the memory for the past, and less to read; default: as computed")
    ] = None,
    speculate: Speculate = "auto",
    device: Device = "cpu",
    page: Annotated[bool, typer.Option(help="a chat page at /")] = True,
) -> None:
    """Serve a model behind OpenAI's API (and DeepSeek's reasoning_content); SIGTERM finishes what was accepted."""
    import torch

    from rorqual.engine import Engine
    from rorqual.engine.recommended import recommended
    from rorqual.serve.run import bind, check_address, check_origins, read_keys
    from rorqual.serve.run import serve as run
    from rorqual.serve.service import Options
    from rorqual.terminal import loading

    if name is not None and not (name.strip() and name.isprintable()):
        raise UserError(f"--name {name!r}: give letters that can be seen, or leave it out")
    if cache_format is not None:
        _choice("--cache-format", cache_format, ("int8",))
    keys = read_keys(api_keys and _local(api_keys))
    check_address(host, keys, anonymous)
    origins = check_origins(allow_origin or ())
    bits, way, computed = _bits(weights), _way(speculate), _dtype(dtype, device)
    directory = _directory(model)
    sampling = recommended(directory)
    listening = bind(host, port)
    with loading(directory):
        engine = Engine(
            directory, slots=slots, cache_bytes=int(cache_gb * 2**30), prefix_cache=True,
            dtype=computed, weights=bits, chunk=512, speculate=way, device=device,
            cache_dtype=cache_format and getattr(torch, cache_format),
        )  # fmt: skip
    options = Options(name or _called(Path(model)), keys, waiting, timeout, host=host, origins=origins)
    run(sampling, engine, options, listening, page)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="smollm2, a .gguf file, or a Hugging Face directory")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="the directory to write")],
) -> None:
    """Bring a model in as a Hugging Face directory."""
    from rorqual.model.gguf import import_model

    destination = _local(destination)
    import_model(local_path(source), destination)
    print(f"{destination}: a Hugging Face directory; try: rorqual chat {destination}")


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a Hugging Face directory")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="the directory to write")],
    format: Annotated[str, typer.Option(help="int4 (a scale for 32 weights) or int8 (one for an output)")] = "int4",
) -> None:
    """Pack a model's weights into 4 or 8 bits, in a layout that transformers and vLLM read too."""
    from rorqual.precision.store import quantize as run

    _choice("--format", format, ("int4", "int8"))
    destination = _local(destination)
    run(_directory(str(model)), destination, format)  # type: ignore[arg-type]
    print(f"{destination}: try: rorqual chat {destination}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine computes with, and why: kernels, dtype, threads. RORQUAL_CPU lowers the class of processor."""
    from rorqual.plan.machine import diagnose

    found = diagnose()
    if as_json:
        print(strict_json.dumps(dict(found)))
        return
    for part, sentence in found:
        print(f"{part:<40} {sentence}")


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, e.g. runs/NAME")]) -> None:
    """Write RUN/report.html and RUN/figures/."""
    from rorqual.report import write_report

    print(write_report(_local(run)))


@app.command()
def speedrun(
    seed: Annotated[int, typer.Option(callback=within(0, 2**32 - 1), help="of everything random")] = 0,
    minutes: Annotated[
        float, typer.Option(callback=within(0, 10**6, above=True), help="wall time of the whole run")
    ] = 10.0,
    out: Annotated[Path | None, typer.Option(help="the run's folder; default: a new one in runs/")] = None,
) -> None:
    """From nothing to a small R1: tokenizer, pre-training, GRPO, rejection sampling and SFT, evaluation, report."""
    from rorqual.speedrun import speedrun as run

    run(out and _local(out), seed, minutes)


def _directory(model: str) -> Path:
    """A model's directory or .gguf file; a run's folder stands for the model in it, a Hub id for its snapshot."""
    from rorqual.model.files import is_gguf, model_directory, unreadable

    path = _local(Path(model))
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


def _local(path: Path) -> Path:
    """A home and variables that a shell has left in it, as in --out=~/run."""
    return Path(local_path(str(path)))


def _called(model: Path) -> str:
    """What clients call what a user has named: a run by the run's name, a file without .gguf."""
    from rorqual.model.files import is_gguf

    path = model.resolve()
    path = path.parent if path.name == "model" else path
    return path.stem if is_gguf(path) else path.name


def _bits(weights: str | None) -> Any:
    if weights is not None:
        _choice("--weights", weights, ("int4", "int8"))
    return weights


def _dtype(name: str, device: str) -> Any:
    """The torch.dtype of --dtype on --device, both checked."""
    _choice("--dtype", name, ("auto", "float32", "bfloat16"))
    _choice("--device", device, DEVICES)
    from rorqual.kernels.machine import compute_dtype

    return compute_dtype(name, device)


def _way(speculate: str) -> Any:
    _choice("--speculate", speculate, ("auto", "lookup", "mtp", "none"))
    return None if speculate == "none" else speculate


def _choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{option} {value!r}: must be one of {', '.join(allowed)}")
