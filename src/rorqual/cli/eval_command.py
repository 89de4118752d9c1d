"""rorqual eval."""

from dataclasses import asdict
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
    find_adapted,
    within,
)
from rorqual.errors import UserError


def evaluate(
    model: ModelDir,
    tasks: Annotated[
        str,
        typer.Option(
            help="comma-separated: reasoning-gym datasets, files of questions and answers, an rl recipe, humaneval"
        ),
    ],
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
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """pass@1 and cons@k on held-out problems, with 95 % intervals.

    A file (.jsonl, .jsonl.gz, .json, .parquet) is used whole; of a recipe's environments only the held-out split.
    """
    from rich.console import Console

    from rorqual.engine import Engine
    from rorqual.evals.evaluate import evaluate as run
    from rorqual.evals.evaluate import sampling_params
    from rorqual.evals.result_tables import gains_table, table
    from rorqual.evals.results import Evaluation, compare
    from rorqual.evals.tasks import open_task, split_tasks

    check_choice("--template", template, ("chat", "r1-zero", "plain"))
    settings: dict[str, Any] = {
        "seed": seed, "template": template, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens,
        "thinking_budget": thinking_budget,
    }  # fmt: skip
    sampling_params(samples, problems, **settings)
    opened = [open_task(task) for task in split_tasks(tasks)]
    computed = check_dtype(dtype, device)
    directories = [find_adapted(model, adapter), *([] if against is None else [find_adapted(against, None)])]
    results: list[Evaluation] = []
    shown: list[dict[str, Any]] = []
    for base, merged in directories:
        directory = merged or base
        try:
            engine = Engine(base, dtype=computed, device=device, adapter=merged)
            result = run(engine, opened, samples, problems, **settings)
        except UserError:
            if shown and as_json:  # the first model's results are not lost with the second
                print(strict_json.dumps(shown[0]))
            raise
        results.append(result)
        shown.append(result.to_dict() | {"model": str(directory)})
        if not as_json:
            Console().print(table(result, str(directory)))
        del engine  # before the other model is loaded
    gains = {} if against is None else compare(results[1].tasks, results[0].tasks)
    if against is not None:
        shown[0] |= {"against": shown[1], "gains": {name: asdict(gain) for name, gain in gains.items()}}
    if as_json:
        print(strict_json.dumps(shown[0]))
    elif against is not None:
        Console().print(gains_table(gains))
