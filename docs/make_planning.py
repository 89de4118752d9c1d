"""Writes the tables of published runs into planning.md: python docs/make_planning.py"""

import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.plan.chips import find_chip
from rorqual.plan.known_models import find_model
from rorqual.plan.layout import Job, Layout, memory_by_rank
from rorqual.plan.published_runs import calibration, published_runs
from rorqual.plan.rl_plan import Tuning, plan_rl
from rorqual.plan.step_time import step_time
from rorqual.plan.training_plan import Question, plan_training, said

PAGE = Path(__file__).parent / "planning.md"
STEPS = Path(__file__).parent / "measured_steps.toml"
START, END = "<!-- published: written by docs/make_planning.py -->", "<!-- /published -->"
GIB = 2**30
BILLS = """Bills of DeepSeek-V3 and R1, in H800 hours, with the layouts that the search finds:"""
ABOUT_BILLS = """The papers do not say on which layouts the context was extended. The search keeps the ranks that
share a sequence within a node (context 8); over four nodes it would find layouts that take 79 K hours. R1's bill is
for two stages: of the second 1700 steps are published, and neither lengths nor the steps of the first. With a mean
of 6000 tokens the second takes what the table says; the rest of 41 K would be {first} steps of the first, with
8000."""
ABOUT_STEPS = """Steps on one node of 8 B200, Megatron in BF16, measured by the authors of SimuMax, with the error
of their simulator beside ours. Its efficiencies are measured on these very chips and shapes; ours is the one number
of Blackwell, {share:.0%}, which is fitted to runs of later software in FP8. So our times are too short, by much the
same factor for dense models, more where products are small (tensor 8) or experts' (SimuMax's own sheet has grouped
products at 0.30 of the peak). Memory is the largest of all ranks, with as many layers on each, as there; both have
BF16 weights, FP32 gradients, and FP32 masters and moments on their owners only. Megatron's fused loss keeps all
logits, Rorqual's a part, which is what is missing most: 4 GiB of 405B's. Its buffers for messages are not counted.
SimuMax's A100 rows are not compared: they are published as a picture and as errors, without times, layers and
links."""


def table() -> str:
    rows = ["| run | chip | layout | published | predicted | error | |", "|---|---|---|---|---|---|---|"]
    for run in published_runs():
        ours = run.predicted(calibration(run.chip.family).utilisation)
        rows.append(
            f"| {run.name} | {run.chip.name.removeprefix('NVIDIA ')} | {said(run.layout)} | {run.tokens_a_second:,.0f} "
            f"| {ours:,.0f} | {ours / run.tokens_a_second - 1:+.0%} | {'fitted' if run.fitted else 'tested'} |"
        )
    sources = "; ".join(f"{run.name}: {run.source}" for run in published_runs())
    return "\n".join(rows) + f"\n\nSources. {_wrapped(sources)}."


# -- bills of hours


def v3_hours(tokens: float, length: int, batch: int) -> float:
    """Of a training of V3 on its own cluster."""
    asked = Question(
        find_model("deepseek-v3"), find_chip("h800"), tokens, 2048, length, batch, "fp8", "bfloat16"
    )  # fmt: skip
    return plan_training(asked).chip_hours.value


def extension_hours() -> float:
    """1000 steps each of 1920 sequences of 32 K tokens and of 480 of 128 K (V3 §4.3)."""
    return sum(v3_hours(1000.0 * length * batch, length, batch) for length, batch in ((32768, 1920), (131072, 480)))


def rl_hours(steps: float, mean: tuple[float, float], limit: float) -> float:
    """Of V3's reinforcement learning on 512 H800; 16 steps share a rollout of 8192 answers (R1, supplement)."""
    asked = Tuning(
        find_model("deepseek-v3"), find_chip("h800"), 512, round(steps / 16), 512, 16, 500.0, mean, limit,
        precision="fp8", weights="fp8",
    )  # fmt: skip
    return plan_rl(asked).chip_hours.value


def bills() -> str:
    second = rl_hours(1700, (6000.0, 6000.0), 32768.0)
    zero = rl_hours(8200, (1000.0, 10000.0), 32768.0) + rl_hours(2200, (10000.0, 14000.0), 65536.0)
    first = 1700 * (41e3 - second) / rl_hours(1700, (8000.0, 8000.0), 32768.0)
    rows = ["| | published | predicted | error |", "|---|---|---|---|"]
    for what, published, ours in (
        ("V3, a trillion tokens", 180e3, v3_hours(1e12, 4096, 15360)),
        ("V3, context to 32 K and 128 K", 119e3, extension_hours()),
        ("R1-Zero", 101e3, zero),
    ):
        rows.append(f"| {what} | {published:,.0f} | {ours:,.0f} | {ours / published - 1:+.0%} |")
    rows.append(f"| R1, its second stage | of 41,000 | {second:,.0f} | |")
    about = ABOUT_BILLS.format(first=f"{round(first, -2):,.0f}")
    return f"{BILLS}\n\n" + "\n".join(rows) + f"\n\n{_wrapped(about)}"


# -- steps on one node


@dataclass(frozen=True)
class MeasuredStep:
    """A row of measured_steps.toml, and our prediction."""

    raw: dict[str, Any]
    layout: Layout
    jobs: tuple[Job, ...]

    @property
    def milliseconds(self) -> list[float]:
        chip = find_chip("b200")
        share = calibration(chip.family).utilisation
        return [1e3 * step_time(job, self.layout, chip, share, 0.0).total for job in self.jobs]

    @property
    def gib(self) -> float:
        return max(memory.total for memory in memory_by_rank(self.jobs[0], self.layout)) / GIB


def measured_steps() -> Iterator[MeasuredStep]:
    for raw in tomllib.loads(STEPS.read_text(encoding="utf-8"))["row"]:
        config = find_model(raw["model"]).replace(
            num_hidden_layers=raw["layers"], first_k_dense_replace=raw.get("first", 0), num_nextn_predict_layers=0
        )
        layout = Layout(schedule="1f1b", dispatch="all-to-all", overlap=False, balanced=False, **raw["layout"])
        length, numbers = raw.get("length", 4096), raw.get("micro_batches", [4, 8, 32])
        yield MeasuredStep(raw, layout, tuple(Job(config, length, n * layout.data) for n in numbers))


def steps() -> str:
    rows = ["| model | layout | ms | ours | SimuMax | GiB | ours | SimuMax |", "|---|---|---|---|---|---|---|---|"]
    for step in measured_steps():
        raw = step.raw
        length = f", {raw['length'] // 1024} K" if "length" in raw else ""
        layout = ", ".join(f"{name} {n}" for name, n in raw["layout"].items())
        took = " / ".join(f"{ms:,.0f}" for ms in raw["measured"])
        used, theirs = raw["gib"]
        rows.append(
            f"| {raw['model']}, {raw['layers']} layers{length} | {layout} | {took} "
            f"| {_errors(step.milliseconds, raw['measured'])} | {_errors(raw['simumax'], raw['measured'])} "
            f"| {used:.1f} | {step.gib / used - 1:+.1%} | {theirs / used - 1:+.1%} |"
        )
    about = ABOUT_STEPS.format(share=calibration("blackwell").utilisation)
    return (
        f"{_wrapped(about)}\n\n" + "\n".join(rows) + "\n\nTimes with 4, 8 and 32 micro-batches; long sequences with 4."
    )


def _errors(ours: list[float], measured: list[float]) -> str:
    return " / ".join(f"{a / b - 1:+.0%}" for a, b in zip(ours, measured, strict=True))


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 118))


def page() -> str:
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    return f"{before}{START}\n{table()}\n\n{bills()}\n\n{steps()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
