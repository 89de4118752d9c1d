"""Evaluate the speedrun: all stages on test problems, the thinking curve, samples and tables."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any

from rich import box
from rich.table import Table

from rorqual.engine import Engine, SamplingParams
from rorqual.evals.collected import Collected
from rorqual.evals.evaluate import collect, thinking_curve
from rorqual.evals.results import CurvePoint, Gain, Scores, TaskResult, compare
from rorqual.evals.summary import summarise
from rorqual.evals.tasks import EnvironmentTask
from rorqual.kernels.dtypes import compute_dtype, dtype_name
from rorqual.plan.cost import parameters
from rorqual.rl.envs.environment import Problem
from rorqual.rl.prompts import prompt_text
from rorqual.rl.rollout import derived_seed
from rorqual.speedrun.documents import line_is_right
from rorqual.speedrun.level import MODEL
from rorqual.speedrun.stages import END, TEMPLATE, SpeedrunState, folders, open_engine, sampling

FIRST, LEAST, MOST = (
    24,
    16,
    1000,
)  # test problems per environment: in the first round, minimum of a later round, in total
SAMPLES, FEW_SAMPLES, SHORT = 8, 4, 4  # answers per problem; fewer in runs below SHORT minutes, for more problems
CURVE = 0.15  # fraction of the evaluation time for the thinking curve
BUDGETS = [0, 16, 32, 64, 128, 192]  # thinking tokens
REPORT = 12.0  # seconds for samples, figures and page, on a machine of REPORT_SPEED
REPORT_SPEED = 11_000  # training tokens/s


@dataclass(frozen=True)
class StageResult:
    name: str
    seconds: float
    tokens: int  # trained on; sampled, for RL
    tasks: dict[str, TaskResult]


@dataclass(frozen=True)
class SampledAnswer:
    """Answers of the first and the last stage to the same question."""

    family: str
    question: str
    before: str
    after: str


@dataclass
class Summary:
    """What summary.json holds."""

    stages: list[StageResult]
    gains: dict[str, dict[str, Gain]]  # stage → family → gain over the stage before
    thinking_curve: dict[str, list[CurvePoint]]  # by family
    samples: list[SampledAnswer]
    seed: int
    minutes: float
    level: str
    problems: str
    training_tokens_per_second: float
    dtype: str
    notes: list[str]
    model: dict[str, Any]
    chat_command: str
    total_seconds: float
    seconds: dict[str, float]  # by stage

    def to_dict(self) -> dict[str, Any]:
        stages = [vars(stage) | {"tasks": {name: task.to_dict() for name, task in stage.tasks.items()}}
                  for stage in self.stages]  # fmt: skip
        return asdict(self) | {"stages": stages}


def evaluate_stages(state: SpeedrunState) -> Summary:
    """The summary: all stages on the same, so far unused test problems, as many as the time allows."""
    left = state.budget.left(END) - REPORT * min(3.0, REPORT_SPEED / state.speed)
    ends = time.monotonic() + left
    engines = {name: open_engine(state.run_dir / folder) for name, folder in folders(state)}
    collected, speed = _collect(state, engines, ends - CURVE * left)
    results = {
        name: {
            family: summarise(found, seed=state.seed, check_line=line_is_right) for family, found in of_families.items()
        }
        for name, of_families in collected.items()
    }
    stages: list[StageResult] = []
    for name, folder in folders(state):
        ledger = json.loads((state.run_dir / folder / "ledger.json").read_text())
        # For RL, the sampled tokens: those trained on are the same ones again.
        tokens = ledger["stages"].get("rollout", ledger["total"])["tokens"]
        stages.append(StageResult(name, state.seconds[name], tokens, results[name]))
    engine = engines[folders(state)[-1][0]]
    total, active = parameters(engine.model.config)
    return Summary(
        stages=stages,
        gains={after: compare(results[before], results[after]) for before, after in pairwise(results)},
        thinking_curve=_thinking_curve(state, engine, speed * (ends - time.monotonic())),
        samples=_samples(state),
        seed=state.seed,
        minutes=state.budget.minutes,
        level=state.level.name,
        problems=state.level.describe,
        training_tokens_per_second=state.speed,
        dtype=dtype_name(compute_dtype()),
        notes=state.notes,
        model={"parameters_total": total, "parameters_active": active, "config": MODEL},
        chat_command=f"rorqual chat {state.run_dir}/model",
        total_seconds=state.budget.spent,
        seconds=state.seconds,
    )


def _collect(
    state: SpeedrunState, engines: dict[str, Engine], ends: float
) -> tuple[dict[str, dict[str, Collected]], float]:
    """({stage: {family: answers}}, tokens/s). All models answer rounds of new problems until `ends` (monotonic time).

    The small first round measures the time per problem.
    """
    tasks = {e.family: EnvironmentTask(e) for e in state.environments}
    streams = {e.family: _distinct(e.stream("test", state.seed)) for e in state.environments}
    samples = SAMPLES if state.budget.minutes >= SHORT else FEW_SAMPLES
    found: dict[str, dict[str, Collected]] = {name: {} for name in engines}
    done, size, started = 0, FIRST, time.monotonic()
    while size:
        seed = derived_seed(state.seed, "test", done)
        params = SamplingParams(temperature=1.0, max_tokens=state.level.max_tokens, n=samples, seed=seed)
        for family, task in tasks.items():
            problems = list(islice(streams[family], size))
            for name, engine in engines.items():
                more = collect(engine, task, problems, params, TEMPLATE)
                found[name][family] = found[name][family] + more if family in found[name] else more
        done += size
        each = (time.monotonic() - started) / done
        fit = int(0.97 * (ends - time.monotonic()) / each)
        size = min(fit, MOST - done, max(3 * done, LEAST)) if fit >= LEAST else 0
    seconds = time.monotonic() - started
    state.console.print(f"   {done} problems per family, {samples} answers each, in {seconds:.0f} s")
    tokens = sum(s.tokens for stage in found.values() for part in stage.values() for s in part.samples)
    return found, tokens / seconds


def _distinct(problems: Iterator[Problem]) -> Iterator[Problem]:
    seen: set[str] = set()
    for problem in problems:
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def _thinking_curve(state: SpeedrunState, engine: Engine, tokens: float) -> dict[str, list[CurvePoint]]:
    """Accuracy by thinking budget, on as many problems as can be answered in `tokens` sampled tokens."""
    lengths = list(state.checks.values())[-1].length
    each = sum(sum(min(budget, length) + 12 for budget in BUDGETS) for length in lengths.values())
    few = int(max(LEAST, min(MOST // 4, 0.7 * tokens / each)))  # 0.7: small batches are slower
    return {
        e.family: thinking_curve(engine, e, BUDGETS, samples=1, problems=few, **sampling(state))
        for e in state.environments
    }


def _samples(state: SpeedrunState) -> list[SampledAnswer]:
    """Answers of the first and the last stage to the same development problems."""
    engines = [open_engine(state.run_dir / folders(state)[which][1]) for which in (0, -1)]
    params = SamplingParams(max_tokens=state.level.max_tokens, seed=state.seed)
    rows: list[SampledAnswer] = []
    for environment in state.environments:
        problems = environment.problems("dev", 3, state.seed)
        texts = []
        for engine in engines:
            prompts = [prompt_text(p.question, TEMPLATE, engine.require_tokenizer()) for p in problems]
            texts.append(["<think>" + c.text for c in engine.generate(prompts, params)])
        rows += [
            SampledAnswer(p.family, p.question, before, after)
            for p, before, after in zip(problems, *texts, strict=True)
        ]
    return rows


def table(summary: Summary) -> Table:
    """Terminal table of stages and families: pass@1 with its interval, cons@k, pass@k, tokens, self-verification."""
    first = next(iter(summary.stages[0].tasks.values()))
    k = first.k
    title = f"{first.problems} held-out problems per family, {k} samples each"
    table = _table(title)
    for name in (
        "stage",
        "family",
        "pass@1 %",
        f"cons@{k}",
        f"pass@{k}",
        "tokens",
        "self-\nverified",
        "verifier\nprecision",
    ):
        table.add_column(
            name,
            justify="left" if name in ("stage", "family") else "right",
            no_wrap="\n" not in name,
        )
    for stage in summary.stages:
        for row, (family, r) in enumerate(stage.tasks.items()):
            table.add_row(
                stage.name if row == 0 else "",
                family,
                _with_half(r),
                _percent(r.cons_at_k),
                _percent(r.pass_at_k),
                f"{r.mean_tokens:.0f}",
                _percent(r.verified_share),
                _percent(r.verdict_precision),
            )
    return table


def difficulty_table(summary: Summary) -> Table:
    """Terminal table of pass@1 of all stages by difficulty, easy to hard."""
    table = _table("pass@1 % by difficulty")
    table.add_column("family")
    table.add_column("difficulty")
    for stage in summary.stages:
        table.add_column(stage.name, justify="right", no_wrap=True)
    for family, last in summary.stages[-1].tasks.items():
        for row, level in enumerate(last.by_difficulty):
            parts = [stage.tasks[family].by_difficulty[level] for stage in summary.stages]
            name = level.replace("num_", "").replace("=", " ")
            table.add_row(family if row == 0 else "", name, *map(_with_half, parts))
    return table


def _table(title: str) -> Table:
    """An empty table narrow enough for 80 columns."""
    return Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)


def _with_half(result: Scores) -> str:
    """pass@1 and half its interval, in percent."""
    low, high = result.interval
    return f"{100 * result.pass_at_1:.1f} ±{50 * (high - low):.1f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
