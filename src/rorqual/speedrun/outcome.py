"""What the speedrun reached: every stage on the test problems, samples to read, the table."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from rorqual.engine import Engine, SamplingParams
from rorqual.evals.run import compare, evaluate, thinking_curve
from rorqual.plan.cost import parameters
from rorqual.reason.documents import line_is_right
from rorqual.reason.environment import Environment
from rorqual.reason.prompts import prompt_text
from rorqual.speedrun.stages import MAX_TOKENS, MODEL, TEMPLATE, Story


def evaluate_stages(story: Story, environments: list[Environment]) -> dict[str, Any]:
    """Every stage's model on the same test problems, read for the first time now."""
    stages, results = [], {}
    options = {"template": TEMPLATE, "temperature": 1.0, "top_p": 1.0, "max_tokens": MAX_TOKENS, "seed": story.seed}
    for name, folder in folders(story):
        engine = _engine(story.run_dir / folder)
        found = evaluate(
            engine, engine.tokenizer, environments, 8, story.plan.test_problems, check_line=line_is_right, **options
        )
        results[name] = found
        ledger = json.loads((story.run_dir / folder / "ledger.json").read_text())
        # Of reinforcement learning, those it sampled; what it learnt from is computed once more.
        tokens = ledger["stages"].get("rollout", ledger["total"])["tokens"]
        stages.append({"name": name, "seconds": story.seconds[name], "tokens": tokens, "tasks": found["tasks"]})
    budgets = [0, 16, 32, 64, 128, 192]
    few = max(50, story.plan.test_problems // 4)
    curve = {
        e.family: thinking_curve(engine, engine.tokenizer, e, budgets, samples=1, problems=few, **options)
        for e in environments
    }
    total, active = parameters(engine.model.config)
    return {
        "stages": stages,
        "gains": {after: compare(results[before], results[after]) for before, after in pairwise(results)},
        "thinking_curve": curve,
        "samples": _samples(story, environments),
        "seed": story.seed,
        "minutes": story.plan.minutes,
        "model": {"parameters_total": total, "parameters_active": active, "config": MODEL},
        "chat_command": f"rorqual chat {story.run_dir}/model",
    }  # fmt: skip


def folders(story: Story) -> list[tuple[str, str]]:
    """Stage and folder of every model there is."""
    every = [("pretrain", "pretrain"), ("rl", "rl"), ("distill", "distill/student")]
    return [(name, folder) for name, folder in every if (story.run_dir / folder / "model").exists()]


def _engine(folder: Path) -> Engine:
    return Engine(folder / "model", slots=1024, dtype=torch.bfloat16)


def _samples(story: Story, environments: list[Environment]) -> list[dict[str, str]]:
    """The same development problems answered before and after, for people to read."""
    rows = []
    for environment in environments:
        problems = environment.problems("dev", 3, story.seed)
        texts = []
        for folder in (folders(story)[0][1], folders(story)[-1][1]):
            engine = _engine(story.run_dir / folder)
            prompts = [prompt_text(p.question, TEMPLATE, engine.tokenizer) for p in problems]
            params = SamplingParams(max_tokens=MAX_TOKENS, seed=story.seed)
            texts.append(["<think>" + c.text for c in engine.generate(prompts, params)])
        rows += [
            {"family": p.family, "question": p.question, "before": before, "after": after}
            for p, before, after in zip(problems, *texts, strict=True)
        ]
    return rows


def table(summary: dict[str, Any]) -> Table:
    """Stages by families: pass@1 with its interval, cons@8, pass@8."""
    table = Table(title="held-out problems, 8 samples each", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("stage", "family", "pass@1 %", "cons@8", "pass@8", "tokens", "says ✓", "✓ right"):
        table.add_column(name, justify="left" if name in ("stage", "family") else "right", no_wrap=True)
    for stage in summary["stages"]:
        for row, (family, r) in enumerate(stage["tasks"].items()):
            half = 50 * (r["interval"][1] - r["interval"][0])
            table.add_row(
                stage["name"] if row == 0 else "",
                family,
                f"{100 * r['pass_at_1']:.1f} ±{half:.1f}",
                _percent(r["cons_at_k"]),
                _percent(r["pass_at_k"]),
                f"{r['mean_tokens']:.0f}",
                _percent(r["verified_share"]),
                _percent(r["verdict_precision"]),
            )
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
