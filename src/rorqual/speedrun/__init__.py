"""`rorqual speedrun`: train a small R1 from scratch in about ten minutes on two cores.

Stages: synthetic documents and a tokenizer; pre-training of a small V3-style MoE; GRPO from the base model, as R1-Zero;
rejection sampling and fine-tuning on correct answers; evaluation of all stages on held-out problems; a report. The
difficulty of the problems is chosen by the measured training speed. Each stage runs the code, and writes the folder, of
the verb of its name.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rorqual import strict_json
from rorqual.errors import UserError, file_error
from rorqual.extras import require
from rorqual.files import write_text
from rorqual.report import write_report
from rorqual.rl.envs.registry import open_environment
from rorqual.speedrun.level import choose_level, machine_line, training_speed
from rorqual.speedrun.outcome import Summary, difficulty_table, evaluate_stages, table
from rorqual.speedrun.stages import (
    MIN_RL_TOKENS,
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
from rorqual.speedrun.time_plan import Forecast, forecast, forecast_table, keep_forecast, write_account
from rorqual.train.rng import set_seed

SHORTEST, LONGEST = 0.5, 60 * 24 * 30  # minutes


def speedrun(out: Path | None, seed: int, minutes: float) -> Summary:
    """Run all stages into `out` (default: a new folder in runs/); returns what summary.json holds.

    Raises UserError for an unusable `out`, `seed` or `minutes`.
    """
    require("rl")
    require("report")
    if not SHORTEST <= minutes <= LONGEST:
        raise UserError(f"--minutes {minutes:g}: must be from {SHORTEST} to {LONGEST:,}")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"--seed {seed}: must be from 0 to {(1 << 63) - 1}")
    run_dir = out or _fresh(Path("runs"))
    try:
        if run_dir.exists() and any(run_dir.iterdir()):
            raise UserError(f"{run_dir} is not empty; choose another --out, or remove it")
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise file_error(run_dir, e, "made") from e
    state = _begin(run_dir, seed, Budget(minutes))
    planned = forecast(state)
    keep_forecast(state, planned)
    state.console.print(forecast_table(planned))

    _run_stage(state, "1. documents and tokenizer", "documents", write_corpus)
    _run_stage(state, "2. pre-training", "pretrain", pretrain_small)
    if state.checks["pretrain"].weak or state.budget.spent > 0.9 * RL_END * state.budget.seconds:
        state.console.print("   reinforcement learning and distillation are skipped")
    else:
        _run_stage(state, "3. reinforcement learning (GRPO)", "rl", reinforce)
        _run_stage(state, "4. rejection sampling and fine-tuning", "distill", distill_best)

    state.announce("5. evaluation of all stages on held-out problems")
    start = time.monotonic()
    summary = evaluate_stages(state)
    state.timed("evaluate", start)
    shutil.copytree(run_dir / folders(state)[-1][1] / "model", run_dir / "model")
    _recommend_sampling(run_dir / "model" / "generation_config.json", state.level.max_tokens)
    _finish(state, summary, planned)
    return summary


def _begin(run_dir: Path, seed: int, budget: Budget) -> SpeedrunState:
    """Measure the machine, choose the level, and print the plan."""
    set_seed(seed)
    speed = training_speed()
    tokens = PRETRAIN_SHARE * budget.seconds * speed
    level = choose_level(tokens)
    state = SpeedrunState(
        run_dir, seed, budget, level, [open_environment(section) for section in level.environments], speed
    )
    plan = [
        machine_line(),
        f"pre-training speed: {speed:,.0f} tokens/s, so about {tokens / 1e6:.1f} M tokens in this run",
        f"problems: {level.describe}",
    ]
    state.console.print("\n".join(plan), soft_wrap=True)
    if tokens < MIN_RL_TOKENS:
        state.note(
            f"reinforcement learning needs about {MIN_RL_TOKENS / 1e6:.1f} M tokens of pre-training; this run will "
            f"learn little: use --minutes {needed(state)} for one that learns to reason"
        )
    return state


def _run_stage(state: SpeedrunState, title: str, name: str, stage: Callable[[SpeedrunState], None]) -> None:
    state.announce(title)
    start = time.monotonic()
    stage(state)
    state.timed(name, start)


def _fresh(parent: Path) -> Path:
    """runs/speedrun, or the first of runs/speedrun-2, -3, … that is free."""
    number = 1
    while (path := parent / ("speedrun" if number == 1 else f"speedrun-{number}")).exists():
        number += 1
    return path


def _recommend_sampling(path: Path, max_tokens: int) -> None:
    """Set RL's sampling parameters for chat, with its max_tokens: the model was never trained on longer answers."""
    own = json.loads(path.read_text())
    own |= {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": max_tokens}
    write_text(path, json.dumps(own, indent=2) + "\n")


def _finish(state: SpeedrunState, summary: Summary, planned: Forecast) -> None:
    summary.total_seconds = state.budget.spent
    path = state.run_dir / "summary.json"
    write_text(path, strict_json.dumps(summary.to_dict(), indent=1, ensure_ascii=False))
    write_account(state, planned)
    page = write_report(state.run_dir)
    summary.total_seconds = state.budget.spent  # the page, which takes seconds to make, has the time before it
    write_text(path, strict_json.dumps(summary.to_dict(), indent=1, ensure_ascii=False))
    write_account(state, planned)
    state.console.print(table(summary), difficulty_table(summary))
    for family, gain in summary.gains.get("rl", {}).items():
        low, high = gain.interval
        state.console.print(
            f"{family}: reinforcement learning adds {100 * gain.gain:.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
        )
    for sentence in state.notes:
        state.console.print(f"[yellow]{sentence}[/yellow]", soft_wrap=True)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in state.seconds.items())
    state.console.print(
        f"{summary.total_seconds:.0f} s in total ({planned.run_seconds:.0f} s were planned): {spent}", soft_wrap=True
    )
    state.console.print(f"report: {page}\nchat:   {summary.chat_command}", soft_wrap=True)
