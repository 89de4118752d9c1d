"""Reinforcement learning whose rollouts are sampled in fewer bits, against rollouts from the weights that are trained.

The speedrun's mixture of experts first learns the speedrun's reasoning documents; from there GRPO goes on for every
seed with rollouts from the trained weights, and from their twins in FP8, 8 and 4 bits with truncated importance
sampling of tokens (the default), and in 4 bits with the corrections that --others names. What is kept: the mismatch of
every step, the reward, pass@1 on held-out problems before and after, and tokens a second.
"""

import statistics
from typing import Any

import torch

from common import arguments, program, report
from small_rl import NOT_KEPT, QUICK, Sizes, folder_of, pretrained, reinforce, summary

PLAIN = "as trained"
TWINS = ("fp8", "int8", "int4")
OTHERS = ("none", "sequence-mask")  # corrections that are compared with the default
MISMATCH = ("mismatch_logprob", "mismatch_kl", "importance_truncated", "routers_differ")


def main() -> None:
    args = arguments(__doc__, threads="0 (all)", runs=NOT_KEPT, others=", ".join(OTHERS))
    if args.threads.isdecimal():
        torch.set_num_threads(int(args.threads))
    sizes = QUICK if args.quick else Sizes()
    others = [name for name in map(str.strip, args.others.split(",")) if name]
    forms: dict[str, dict[str, Any]] = {PLAIN: {}} | {twin: {"rollout_weights": twin} for twin in TWINS}
    forms |= {f"{TWINS[-1]}, {name}": forms[TWINS[-1]] | {"correction": name} for name in others}
    runs: list[dict[str, Any]] = []
    with folder_of(args.runs) as folder:
        start = pretrained(folder, sizes.learn)
        for seed in range(sizes.seeds):
            for form, fields in forms.items():
                update = () if form == PLAIN else MISMATCH
                runs.append(reinforce(folder, start, form, seed, sizes, {"grpo": fields}, update))
    by_form = {form: [run for run in runs if run["form"] == form] for form in forms}
    rows = {
        form: [*summary(own, sizes.last), statistics.median(r["tokens_per_second"] for r in own)]
        for form, own in by_form.items()
    }
    mismatch: list[list[Any]] = []
    for form in [form for form in forms if form != PLAIN]:
        values = [[v for run in by_form[form] for v in run[name] if v is not None] for name in MISMATCH]
        mismatch.append([form, *(statistics.mean(own) if own else "–" for own in values)])
    plain = rows[PLAIN]
    ratios: dict[str, float] = {}
    for form in [form for form in forms if form != PLAIN]:
        ratios[f"pass-at-1/{form}-rollouts"] = rows[form][2] / max(plain[2], 1e-9)
        ratios[f"tokens-per-second/{form}-rollouts"] = rows[form][-1] / plain[-1]
    report(
        "rounded_rollouts", args, ratios, {"runs": runs, "steps": sizes.steps},
        [
            (f"{sizes.steps} steps of GRPO, {sizes.seeds} seeds",
             ["rollouts", "pass@1 before", "after", "by seed", "reward at the end", "tokens/s"], list(rows.values())),
            ("Mismatch, mean over the steps", ["rollouts", *MISMATCH], mismatch),
        ],
        ["torch", "reasoning-gym"],
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
