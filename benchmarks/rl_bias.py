"""Balancing a mixture of experts in reinforcement learning: bias frozen, bias live, or a sequence loss.

The speedrun's mixture of experts first learns the speedrun's reasoning documents, with its bias live. From there GRPO
goes on for every seed three times over the same problems: with the correction bias as it is (frozen), going on with
V3's speed (live), and frozen with V3's sequence loss. What is kept: reward, pass@1 on held-out problems before and
after, and MaxVio, the busiest expert's load over the mean less one.
"""

import statistics
from typing import Any

import torch

from common import arguments, program, report
from small_rl import NOT_KEPT, QUICK, Sizes, folder_of, pretrained, reinforce, summary

FORMS: dict[str, dict[str, float]] = {
    "frozen": {},
    "live": {"bias_speed": 0.001},
    "sequence loss": {"sequence_loss": 0.0001},
}
# With a KL term all groups are trained on, so that MaxVio is of all tokens.
ALL_GROUPS = {"kl": 0.001, "drop_zero_std_groups": False}


def main() -> None:
    args = arguments(__doc__, threads="0 (all)", runs=NOT_KEPT)
    if args.threads.isdecimal():
        torch.set_num_threads(int(args.threads))
    sizes = QUICK if args.quick else Sizes()
    runs: list[dict[str, Any]] = []
    with folder_of(args.runs) as folder:
        start = pretrained(folder, sizes.learn)
        for seed in range(sizes.seeds):
            for form, fields in FORMS.items():
                changes = {"grpo": ALL_GROUPS, "balance": fields | {"bias_stop_at": 1.0}}
                run = reinforce(folder, start, form, seed, sizes, changes, ["max_vio_per_layer"])
                runs.append(run | {"max_vio": [statistics.mean(vio) for vio in run.pop("max_vio_per_layer")]})
    by_form = {form: [run for run in runs if run["form"] == form] for form in FORMS}
    rows = [
        [
            *summary(own, sizes.last), statistics.mean(r["max_vio"][0] for r in own),
            statistics.mean(statistics.mean(r["max_vio"][-sizes.last :]) for r in own),
        ]
        for own in by_form.values()
    ]  # fmt: skip
    frozen = rows[0]
    ratios = {
        key: value
        for row in rows[1:]
        for key, value in (
            (f"pass-at-1/{row[0].replace(' ', '-')}", frozen[2] / max(row[2], 1e-9)),
            (f"max-vio/{row[0].replace(' ', '-')}", row[6] / frozen[6]),
        )
    }
    report(
        "rl_bias", args, ratios, {"runs": runs, "steps": sizes.steps},
        [(f"{sizes.steps} steps of GRPO, {sizes.seeds} seeds",
          ["balance", "pass@1 before", "after", "by seed", "reward at the end", "MaxVio at first", "at the end"],
          rows)],
        ["torch", "reasoning-gym"],
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
