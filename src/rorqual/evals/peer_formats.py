"""Results as lm-eval and lighteval write them, for what reads those.

lm-eval/MODEL/results_DATE.json, samples_TASK_DATE.jsonl       (lm_eval/result_schema.py, 0.4.13)
lighteval/results/MODEL/results_DATE.json                      (lighteval/logging/evaluation_tracker.py, 0.13)
"""

import datetime
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rorqual import strict_json
from rorqual.errors import file_error
from rorqual.evals.collected import Collected
from rorqual.evals.results import Evaluation, Scores, TaskResult
from rorqual.files import write_text

VERSION = 1  # of our prompts and judges, where those programs keep a task's version


def write_results(
    out: Path, result: Evaluation, collected: Mapping[str, Collected], model: str, began: float
) -> list[Path]:
    """Write all files below `out`, with the time at which the evaluation began in their names. → their paths.

    Raises UserError where they cannot be written.
    """
    date = datetime.datetime.fromtimestamp(began, datetime.UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
    stamp, folder = date.replace(":", "-"), re.sub(r"[\"<>:/|\\?*\[\]]+", "__", model.strip("/")) or "model"
    first, second = out / "lm-eval" / folder, out / "lighteval" / "results" / folder
    files = {
        out / "results.json": strict_json.dumps(result.to_dict() | {"model": model}, indent=1),
        first / f"results_{stamp}.json": strict_json.dumps(lm_eval(result, collected, model, folder, began), indent=2),
        second / f"results_{stamp}.json": strict_json.dumps(lighteval(result, collected, model, began), indent=2),
    }
    for name, found in collected.items():
        task = re.sub(r"\W", "_", name)
        lines = [strict_json.dumps(row, ensure_ascii=False) for row in lm_eval_samples(result, found)]
        files[first / f"samples_{task}_{stamp}.jsonl"] = "".join(line + "\n" for line in lines)
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise file_error(path.parent, e) from e
        write_text(path, text)
    return list(files)


def figures(found: Scores, scores: list[float]) -> dict[str, tuple[float, float | None]]:
    """{metric: (value, standard error)}; the error is of the mean over problems, and given for pass@1.

    scores: pass@1 of each problem.
    """
    error = float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None
    out: dict[str, tuple[float, float | None]] = {"pass@1": (found.pass_at_1, error)}
    if found.k > 1:
        out[f"pass@{found.k}"] = (found.pass_at_k, None)
        if found.cons_at_k is not None:
            out[f"cons@{found.k}"] = (found.cons_at_k, None)
    out |= {name: (metric.value, None) for name, metric in found.metrics.items()}
    return out | {"truncated": (found.truncated_share, None), "tokens": (found.mean_tokens, None)}


def lm_eval(
    result: Evaluation, collected: Mapping[str, Collected], model: str, folder: str, began: float
) -> dict[str, Any]:
    """lm-eval's results: metrics are named `metric,filter`, and a standard error that is not computed is "N/A"."""
    results: dict[str, dict[str, Any]] = {}
    for name, task in result.tasks.items():
        row: dict[str, Any] = {"name": name, "alias": name, "sample_len": task.problems}
        for metric, (value, error) in figures(task, task.scores).items():
            row |= {f"{metric},none": value, f"{metric}_stderr,none": "N/A" if error is None else error}
        results[name] = row
    better = {metric: metric not in ("truncated", "tokens") for row in results.values() for metric in _metrics(row)}
    return {
        "results": results,
        "group_subtasks": {name: [] for name in results},
        "configs": {name: _config(result, task) | {"task": name} for name, task in result.tasks.items()},
        "versions": dict.fromkeys(results, VERSION),
        "n-shot": dict.fromkeys(results, 0),
        "higher_is_better": {name: {m: better[m] for m in _metrics(row)} for name, row in results.items()},
        "n-samples": {n: {"original": task.problems, "effective": task.problems} for n, task in result.tasks.items()},
        "config": {
            "model": "rorqual", "model_args": f"pretrained={model}", "batch_size": None, "device": None, "limit": None,
            "bootstrap_iters": 2000, "gen_kwargs": _sampling(result), "random_seed": result.seed,
        },
        "date": began, "model_source": "rorqual", "model_name": model, "model_name_sanitized": folder,
        "task_hashes": {name: task.questions_hash for name, task in result.tasks.items()},
        "total_evaluation_time_seconds": str(result.seconds),
    }  # fmt: skip


def lm_eval_samples(result: Evaluation, found: Collected) -> list[dict[str, Any]]:
    """A row per problem: its prompt, all answers and their mean score."""
    rows: list[dict[str, Any]] = []
    for i, (problem, prompt) in enumerate(zip(found.problems, found.prompts, strict=True)):
        samples = found.samples[i * found.per_problem : (i + 1) * found.per_problem]
        doc = {"question": problem.question, "answer": problem.answer, "difficulty": problem.difficulty}
        rows.append({
            "doc_id": i, "doc": doc, "target": problem.answer,
            "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": _sampling(result)}},
            "resps": [[s.text for s in samples]], "filtered_resps": [s.answer or "" for s in samples],
            "filter": "none", "metrics": ["pass@1"], "pass@1": sum(s.correct for s in samples) / len(samples),
            "finish_reasons": [s.finish_reason for s in samples],
            "doc_hash": _hash(json.dumps(doc)), "prompt_hash": _hash(prompt), "target_hash": _hash(problem.answer),
        })  # fmt: skip
    return rows


def lighteval(result: Evaluation, collected: Mapping[str, Collected], model: str, began: float) -> dict[str, Any]:
    """lighteval's results: a task is named `task:few-shot examples`, and "all" is the mean over the tasks."""
    results: dict[str, dict[str, float]] = {}
    for name, task in result.tasks.items():
        row = results[f"{name}:0"] = {}
        for metric, (value, error) in figures(task, task.scores).items():
            row |= {metric: value} | ({} if error is None else {f"{metric}_stderr": error})
    shared = set.intersection(*(set(row) for row in results.values())) if results else set[str]()
    results["all"] = {m: float(np.mean([row[m] for row in results.values()])) for m in sorted(shared)}
    tasks = {f"{name}:0": task for name, task in result.tasks.items()}
    return {
        "config_general": {
            "lighteval_sha": "rorqual", "num_fewshot_seeds": None, "max_samples": None, "job_id": None,
            "start_time": began, "end_time": began + result.seconds,
            "total_evaluation_time_secondes": str(result.seconds), "model_name": model,
            "model_config": {"model_name": model, "generation_parameters": _sampling(result)},
        },
        "results": results,
        "versions": dict.fromkeys(tasks, VERSION),
        "config_tasks": {
            name: _config(result, task) | {
                "name": name.partition(":")[0], "generation_size": result.max_tokens, "version": VERSION,
                "num_samples": [result.samples], "original_num_docs": task.problems,
                "effective_num_docs": task.problems,
            }
            for name, task in tasks.items()
        },
        "summary_tasks": {
            name: {"hashes": {"hash_examples": task.questions_hash}, "truncated": sum(
                s.finish_reason == "length" for s in collected[name.rpartition(":")[0]].samples
            )}
            for name, task in tasks.items()
        },
        "summary_general": {"hashes": {}, "truncated": sum(
            s.finish_reason == "length" for found in collected.values() for s in found.samples
        )},
    }  # fmt: skip


def _metrics(row: Mapping[str, Any]) -> list[str]:
    return [key.removesuffix(",none") for key in row if key.endswith(",none") and "_stderr" not in key]


def _sampling(result: Evaluation) -> dict[str, Any]:
    return {
        "temperature": result.temperature, "top_p": result.top_p, "max_gen_toks": result.max_tokens,
        "do_sample": result.temperature > 0, "seed": result.seed, "n": result.samples,
        "thinking_budget": result.thinking_budget, "until": [],
    }  # fmt: skip


def _config(result: Evaluation, task: TaskResult) -> dict[str, Any]:
    return {
        "judge": task.judge, "num_fewshot": 0, "repeats": result.samples, "output_type": "generate_until",
        "generation_kwargs": _sampling(result), "prompt_template": result.template,
        "confidence_interval": list(task.interval),
    }  # fmt: skip


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
