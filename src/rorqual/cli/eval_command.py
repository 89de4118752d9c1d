"""rorqual eval."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rorqual import strict_json
from rorqual.cli.options import (
    NO_LIMIT,
    SEEDS,
    Adapter,
    AsJson,
    Device,
    Dtype,
    ModelDir,
    ThinkingBudget,
    check_choice,
    check_dtype,
    expand_path,
    find_adapted,
    within,
)
from rorqual.errors import UserError


def evaluate(
    model: ModelDir,
    tasks: Annotated[
        str,
        typer.Option(
            help="comma-separated: benchmarks (aime24, aime25, math500, gpqa-diamond, mmlu, mmlu-pro, gsm8k, "
            "livecodebench, humaneval, ifeval, arc-agi, bfcl), reasoning-gym datasets, files of questions and answers, "
            "FILE.py:Class, an rl recipe"
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TASK=]PATH",
            help="a benchmark's published data in a local file or folder, or on the Hub; once a benchmark",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(callback=within(1, 10**6), help="samples a problem")] = 8,
    problems: Annotated[
        int,
        typer.Option(
            callback=within(1, NO_LIMIT),
            help="problems a task, at most: from the held-out split or the file",
        ),
    ] = 200,
    template: Annotated[str, typer.Option(help="chat, r1-zero or plain")] = "chat",
    temperature: Annotated[float, typer.Option(callback=within(0, 100), help="sampling temperature")] = 0.6,
    top_p: Annotated[float, typer.Option(callback=within(0, 1, above=True), help="top-p (nucleus) sampling")] = 0.95,
    max_tokens: Annotated[int, typer.Option(callback=within(1, NO_LIMIT), help="maximum tokens an answer")] = 1024,
    thinking_budget: ThinkingBudget = None,
    seed: Annotated[int, typer.Option(callback=within(*SEEDS), help="seed of problems and sampling")] = 0,
    against: Annotated[str | None, typer.Option(help="a second model: report the paired gain over it")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="folder that keeps the answers, goes on with them after an interruption, and gets the results, also "
            "as lm-eval and lighteval write them"
        ),
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="judge again with a second judge, and show disagreements")
    ] = False,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """pass@1 and cons@k on held-out problems, with 95 % intervals.

    A benchmark's data are those of --data, else of its package, else of the Hugging Face Hub.
    A file (.jsonl, .jsonl.gz, .json, .parquet) is used whole; of datasets, of FILE.py:Class and of a recipe's
    environments only the test split, which is never trained on.
    """
    from rorqual.console import output
    from rorqual.engine import Engine
    from rorqual.evals.evaluate import evaluate as run
    from rorqual.evals.evaluate import sampling_params
    from rorqual.evals.out_folder import weights_fingerprint
    from rorqual.evals.result_tables import audit_tables, gains_table, table
    from rorqual.evals.results import Evaluation, compare
    from rorqual.evals.tasks import open_task, read_data, split_tasks

    check_choice("--template", template, ("chat", "r1-zero", "plain"))
    settings: dict[str, Any] = {
        "seed": seed, "template": template, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens,
        "thinking_budget": thinking_budget,
    }  # fmt: skip
    sampling_params(samples, problems, **settings)
    names = split_tasks(tasks)
    of_benchmarks = read_data(names, data or [])
    opened = [
        open_task(task, data=of_benchmarks.get(task.partition(":")[0].lower()) if isinstance(task, str) else None)
        for task in names
    ]
    computed = check_dtype(dtype, device)
    directories = [find_adapted(model, adapter), *([] if against is None else [find_adapted(against, None)])]
    folders = [None, None] if out is None else [expand_path(out), expand_path(out) / "against"]
    results: list[Evaluation] = []
    shown: list[dict[str, Any]] = []
    for (base, merged), folder in zip(directories, folders, strict=False):
        directory = merged or base
        try:
            engine = Engine(base, dtype=computed, device=device, adapter=merged)
            fingerprints = weights_fingerprint(base) + ("" if merged is None else "+" + weights_fingerprint(merged))
            identity = {
                "model": str(directory), "weights": fingerprints, "dtype": dtype, "device": device,
            }  # fmt: skip
            result = run(engine, opened, samples, problems, out=folder, model=identity, audited=audit, **settings)
        except UserError:
            if shown and as_json:  # the first model's results are not lost with the second
                print(strict_json.dumps(shown[0]))
            raise
        results.append(result)
        shown.append(result.to_dict() | {"model": str(directory)})
        if not as_json:
            output(highlight=True).print(table(result, str(directory)), *audit_tables(result.audits) if audit else ())
        del engine  # before the other model is loaded
    gains = {} if against is None else compare(results[1].tasks, results[0].tasks)
    if against is not None:
        shown[0] |= {"against": shown[1], "gains": {name: asdict(gain) for name, gain in gains.items()}}
    if as_json:
        print(strict_json.dumps(shown[0]))
    elif against is not None:
        output(highlight=True).print(gains_table(gains))
