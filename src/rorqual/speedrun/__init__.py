"""The main job: from nothing to a small R1 in about ten minutes on two cores.

Documents made by generators → tokenizer → pre-training of a small V3-style mixture of experts → GRPO from there, as
R1-Zero → rejection sampling and fine-tuning on what was right → every stage on held-out problems → a report.
Each stage is the same code, and leaves the same folder, as the verb of its name.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from rorqual.errors import UserError
from rorqual.reason.environment import open_environment
from rorqual.report import write_report
from rorqual.speedrun.outcome import evaluate_stages, folders, table
from rorqual.speedrun.stages import (
    ENVIRONMENTS,
    MAX_TOKENS,
    Plan,
    Story,
    distill_best,
    pretrain_small,
    reinforce,
    write_corpus,
)


def speedrun(out: Path | None, seed: int, minutes: float) -> dict[str, Any]:
    """Run everything into `out` (default: a new folder in runs/) and give what summary.json holds."""
    if minutes < 0.5:
        raise UserError(f"--minutes {minutes:g}: at least 0.5 are needed")
    run_dir = out or _fresh(Path("runs"))
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir} is not empty; give another --out, or remove it")
    run_dir.mkdir(parents=True, exist_ok=True)
    story = Story(run_dir, seed, Plan(minutes))
    environments = [open_environment(section) for section in ENVIRONMENTS]

    start = time.monotonic()
    story.chapter("1. documents and tokenizer")
    write_corpus(story, environments)
    story.timed("documents", start)

    stages = [("pretrain", pretrain_small), ("rl", reinforce), ("distill", distill_best)]
    titles = {"pretrain": "2. pre-training", "rl": "3. reinforcement learning (GRPO)",
              "distill": "4. rejection sampling and fine-tuning"}  # fmt: skip
    for name, stage in stages:
        story.chapter(titles[name])
        start = time.monotonic()
        stage(story)
        story.timed(name, start)

    story.chapter("5. held-out problems, each stage")
    start = time.monotonic()
    summary = evaluate_stages(story, environments)
    story.timed("evaluate", start)
    shutil.copytree(run_dir / folders(story)[-1][1] / "model", run_dir / "model")
    _recommend_sampling(run_dir / "model" / "generation_config.json")
    _finish(story, summary)
    return summary


def _fresh(parent: Path) -> Path:
    """runs/speedrun, or the first of runs/speedrun-2, -3, … that is free."""
    number = 1
    while (path := parent / ("speedrun" if number == 1 else f"speedrun-{number}")).exists():
        number += 1
    return path


def _recommend_sampling(path: Path) -> None:
    """Chat samples as reinforcement learning did; past that length the model has never been."""
    own = json.loads(path.read_text())
    own |= {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": MAX_TOKENS}
    path.write_text(json.dumps(own, indent=2) + "\n")


def _finish(story: Story, summary: dict[str, Any]) -> None:
    summary["total_seconds"] = time.monotonic() - story.started
    summary["seconds"] = story.seconds
    (story.run_dir / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False))
    page = write_report(story.run_dir)
    story.console.print(table(summary))
    for family, gain in summary["gains"]["rl"].items():
        low, high = gain["interval"]
        story.console.print(
            f"{family}: reinforcement learning adds {100 * gain['gain']:.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
        )
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in story.seconds.items())
    story.console.print(f"{summary['total_seconds']:.0f} s in all: {spent}; {torch.get_num_threads()} threads")
    story.console.print(f"report: {page}\nchat:   {summary['chat_command']}", soft_wrap=True)
