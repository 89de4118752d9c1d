"""The main job: from nothing to a small R1 in about ten minutes on two cores.

The machine is measured, and problems and sizes are fitted to it. Documents made by generators → tokenizer →
pre-training of a small V3-style mixture of experts → GRPO from there, as R1-Zero → rejection sampling and fine-tuning
on what was right → every stage on held-out problems → a report. Each stage is the same code, and leaves the same
folder, as the verb of its name.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from rorqual import strict_json
from rorqual.errors import UserError, file_error
from rorqual.extras import require
from rorqual.files import write_text
from rorqual.report import write_report
from rorqual.rl.envs.registry import open_environment
from rorqual.speedrun.level import choose_level, machine_line, training_speed
from rorqual.speedrun.outcome import difficulty_table, evaluate_stages, table
from rorqual.speedrun.stages import (
    ENOUGH,
    PRETRAIN_END,
    PRETRAIN_SHARE,
    RL_END,
    Budget,
    SpeedrunState,
    distill_best,
    folders,
    needed,
    pretrain_small,
    reinforce,
    write_corpus,
)
from rorqual.train.rng import set_seed

LONGEST = 60 * 24 * 30  # minutes


def speedrun(out: Path | None, seed: int, minutes: float) -> dict[str, Any]:
    """Run everything into `out` (default: a new folder in runs/) and give what summary.json holds."""
    require("rl")
    require("report")
    if not 0.5 <= minutes <= LONGEST:
        raise UserError(f"--minutes {minutes:g}: at least 0.5 are needed, and {LONGEST:,} at most")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"--seed {seed}: must be from 0 to {(1 << 63) - 1}")
    run_dir = out or _fresh(Path("runs"))
    try:
        if run_dir.exists() and any(run_dir.iterdir()):
            raise UserError(f"{run_dir} is not empty; give another --out, or remove it")
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise file_error(run_dir, e, "made") from e
    story = _begin(run_dir, seed, Budget(minutes))

    _chapter(story, "1. documents and tokenizer", "documents", write_corpus)
    _chapter(story, "2. pre-training", "pretrain", pretrain_small)
    if story.checks["pretrain"].weak or story.budget.spent > 0.9 * RL_END * story.budget.seconds:
        story.console.print("   reinforcement learning and what follows from it are left out")
    else:
        _chapter(story, "3. reinforcement learning (GRPO)", "rl", reinforce)
        _chapter(story, "4. rejection sampling and fine-tuning", "distill", distill_best)

    story.chapter("5. held-out problems, each stage")
    start = time.monotonic()
    summary = evaluate_stages(story)
    story.timed("evaluate", start)
    shutil.copytree(run_dir / folders(story)[-1][1] / "model", run_dir / "model")
    _recommend_sampling(run_dir / "model" / "generation_config.json", story.level.max_tokens)
    _finish(story, summary)
    return summary


def _begin(run_dir: Path, seed: int, budget: Budget) -> SpeedrunState:
    """Measure the machine, choose the level, and say what to expect."""
    set_seed(seed)
    speed = training_speed()
    tokens = PRETRAIN_SHARE * budget.seconds * speed
    level = choose_level(tokens)
    story = SpeedrunState(
        run_dir, seed, budget, level, [open_environment(section) for section in level.environments], speed
    )
    plan = [
        machine_line(),
        f"pre-training does {speed:,.0f} tokens/s, so about {tokens / 1e6:.1f} M in this run",
        f"problems: {level.describe}",
        f"time: pre-training until {PRETRAIN_END * budget.seconds:.0f} s, reinforcement learning until "
        f"{RL_END * budget.seconds:.0f} s, everything until {budget.seconds:.0f} s",
    ]
    story.console.print("\n".join(plan), soft_wrap=True)
    if tokens < ENOUGH:
        story.note(
            f"reinforcement learning needs a start that took about {ENOUGH / 1e6:.1f} M tokens; expect "
            f"little of this run, and give --minutes {needed(story)} for one that learns to reason"
        )
    return story


def _chapter(story: SpeedrunState, title: str, name: str, stage: Any) -> None:
    story.chapter(title)
    start = time.monotonic()
    stage(story)
    story.timed(name, start)


def _fresh(parent: Path) -> Path:
    """runs/speedrun, or the first of runs/speedrun-2, -3, … that is free."""
    number = 1
    while (path := parent / ("speedrun" if number == 1 else f"speedrun-{number}")).exists():
        number += 1
    return path


def _recommend_sampling(path: Path, max_tokens: int) -> None:
    """Chat samples as reinforcement learning did; past that length the model has never been."""
    own = json.loads(path.read_text())
    own |= {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": max_tokens}
    write_text(path, json.dumps(own, indent=2) + "\n")


def _finish(story: SpeedrunState, summary: dict[str, Any]) -> None:
    summary["total_seconds"] = story.budget.spent
    summary["seconds"] = story.seconds
    path = story.run_dir / "summary.json"
    write_text(path, strict_json.dumps(summary, indent=1, ensure_ascii=False))
    page = write_report(story.run_dir)
    summary["total_seconds"] = story.budget.spent  # the page, which takes seconds itself, has what was spent before it
    write_text(path, strict_json.dumps(summary, indent=1, ensure_ascii=False))
    story.console.print(table(summary), difficulty_table(summary))
    for family, gain in summary["gains"].get("rl", {}).items():
        low, high = gain["interval"]
        story.console.print(
            f"{family}: reinforcement learning adds {100 * gain['gain']:.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
        )
    for sentence in story.notes:
        story.console.print(f"[yellow]{sentence}[/yellow]", soft_wrap=True)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in story.seconds.items())
    story.console.print(f"{summary['total_seconds']:.0f} s in all: {spent}")
    story.console.print(f"report: {page}\nchat:   {summary['chat_command']}", soft_wrap=True)
