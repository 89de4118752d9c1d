"""The reward that GRPO reaches in equal wall time, ours against TRL's GRPOTrainer: SmolLM2-135M-Instruct learns sums.

The task is R1-Zero's (docs/r1-zero-smollm2.md): sums of two numbers of two digits, with two worked examples in the
prompt; 1 for the right answer in its tags at the end, 0.1 for the format. A step is 8 questions with 8 completions of
up to 48 tokens, on-policy, with the same optimizer. Both compute in --dtype (auto: the fastest of the machine). The
side with less time on its own clock takes the next step, until both have had --minutes; loading and the first step,
which warms up, are not counted.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, fastest, program, report
from rl_step import QUIET, Step
from rorqual.checkpoint.gguf_import import import_model
from workers import Field

SIDES = {"rorqual": "rl_step:Ours", "trl": "rl_step:TRL"}
LR = 2e-5
PARTS = 5  # of the time; rewards are means over each


def raced(field: Field, seconds: float) -> dict[str, list[Step]]:
    """Steps of each side until it has had its `seconds`; the one behind goes first."""
    found: dict[str, list[Step]] = {side: [] for side in SIDES}
    clock = dict.fromkeys(SIDES, 0.0)
    for side in SIDES:
        field.ask(side, "step")  # warms up
    while running := [side for side in SIDES if side in field and clock[side] < seconds]:
        side = min(running, key=clock.__getitem__)
        step = field.ask(side, "step")
        if step is not None:
            found[side].append(step)
            clock[side] += step.seconds
    return found


def by_part(steps: list[Step], seconds: float) -> list[float | None]:
    """Mean reward of the steps that began in each part of the time."""
    parts: list[list[float]] = [[] for _ in range(PARTS)]
    begin = 0.0
    for step in steps:
        parts[min(PARTS - 1, int(PARTS * begin / seconds))].append(step.reward)
        begin += step.seconds
    return [statistics.mean(part) if part else None for part in parts]


def main() -> None:
    args = arguments(__doc__, turn=900, whole=14400, minutes="10", dtype="auto")
    minutes = 0.2 if args.quick else float(args.minutes)
    sizes = (2, 2, 8) if args.quick else (8, 8, 48)
    dtype = fastest() if args.dtype == "auto" else args.dtype
    with tempfile.TemporaryDirectory() as folder, Field(args.turn_limit, args.limit) as field:
        path = Path(folder) / "smollm2"
        import_model("smollm2", path)
        for side, make in SIDES.items():
            field.enter(side, make, path, dtype, *sizes, "sums", LR, ours=side == "rorqual", environment=QUIET)
        steps = raced(field, 60 * minutes)
    figures: dict[str, Any] = {"minutes": minutes, "dtype": dtype, "sizes": sizes}
    rows: list[list[Any]] = []
    for side, own in steps.items():
        if not own:
            continue
        parts = by_part(own, 60 * minutes)
        figures[side] = {
            "rewards": [round(s.reward, 4) for s in own], "seconds": [round(s.seconds, 3) for s in own],
            "parts": parts, "tokens": sum(s.tokens for s in own),
        }  # fmt: skip
        shown = ["–" if part is None else round(part, 3) for part in parts]
        rows.append([side, len(own), statistics.median(s.seconds for s in own), *shown])
    ratios: dict[str, float] = {}
    if len(rows) == len(SIDES):
        ratios["steps/trl"] = len(steps["rorqual"]) / len(steps["trl"])
        ours, theirs = (figures[side]["parts"][-1] for side in SIDES)
        if ours and theirs:
            ratios["reward-at-the-end/trl"] = ours / theirs
    columns = ["", "steps", "s a step", *(f"reward, part {i} of {PARTS}" for i in range(1, PARTS + 1))]
    report(
        "rl_reward", args, ratios, figures, [(f"GRPO for {minutes:g} minutes each, {dtype}", columns, rows)],
        ["torch", "transformers", "trl"], field.failed, field.ours,
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
