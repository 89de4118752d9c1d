"""How long the speedrun's stages take, said before they start and scored when they have ended."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from rorqual import strict_json
from rorqual.files import write_text
from rorqual.kernels.dtypes import compute_dtype
from rorqual.model import ModelConfig
from rorqual.plan.engine_time import engine_costs_here
from rorqual.plan.fitting import interval
from rorqual.plan.ledger import PREDICTION, Ledger
from rorqual.plan.rl_here import sampling_seconds
from rorqual.plan.rl_plan import Lengths
from rorqual.speedrun.documents import LARGEST
from rorqual.speedrun.level import MODEL
from rorqual.speedrun.outcome import CURVE, FEW_SAMPLES, FIRST, MOST, REPORT, REPORT_SPEED, SAMPLES, SHORT
from rorqual.speedrun.stages import (
    CHECK_SAMPLES,
    END,
    MAX_NUM_SEQS,
    MIN_RL_TOKENS,
    PRETRAIN_END,
    PRETRAIN_SHARE,
    RL_END,
    SpeedrunState,
    check_problems,
    document_counts,
    folders,
)

DOCUMENT_SECONDS = 9.5e-5  # with the tokenizer's training, on a machine of REPORT_SPEED
DISTILL_SHARE = 0.012  # of the budget, as it comes out
PROMPT, ANSWER_SHARE = 20, 0.3  # tokens of a prompt; of an answer, of the most
SPREAD, CHECK_SPREAD = 0.03, 0.5  # of the logarithm: of what the budget sets; of what it does not


@dataclass(frozen=True)
class Forecast:
    """Seconds of the stages, and what is done in them. What follows `stages` is of the whole run."""

    stages: dict[str, float]
    run_seconds: float
    run_seconds_interval: tuple[float, float]  # 80 %
    pretrain_tokens: float
    tokens_per_second: float  # of pre-training
    problems: int  # that each stage is evaluated on, of each family
    samples: int
    calibration: str  # of the engine's speed

    def to_dict(self) -> dict[str, Any]:
        """With the stages' seconds as a report looks for them."""
        by_stage = {name: {"seconds": seconds} for name, seconds in self.stages.items()}
        return asdict(self) | by_stage | {"seconds": self.run_seconds}


def forecast(state: SpeedrunState) -> Forecast:
    budget, slower = state.budget.seconds, REPORT_SPEED / state.speed
    samples = SAMPLES if state.budget.minutes >= SHORT else FEW_SAMPLES
    checked = answers_seconds(state, check_problems(state), CHECK_SAMPLES)
    report = REPORT * min(3.0, slower)
    learns = PRETRAIN_SHARE * budget * state.speed > MIN_RL_TOKENS
    stages = {"documents": state.budget.spent + slower * DOCUMENT_SECONDS * sum(document_counts(state))}
    until = PRETRAIN_END * budget
    pretraining = max(until - stages["documents"], 0.01 * budget)
    stages["pretrain"] = pretraining + checked
    if learns:
        stages["rl"] = max(RL_END * budget - sum(stages.values()), 0.01 * budget) + checked
        stages["distill"] = DISTILL_SHARE * budget
    else:  # its time is used for pre-training
        more = max(RL_END * budget - sum(stages.values()), 0.01 * budget)
        stages["pretrain"] += more + checked
        pretraining += more
    before, models = sum(stages.values()), 3 if learns else 1
    first, all_of_them = (models * answers_seconds(state, count, samples) for count in (FIRST, MOST))
    time = max(END * budget - before - report, first)  # of a round at least, and until all problems are answered
    time = min(time, max(first, all_of_them / (1 - CURVE)))
    stages |= {"evaluate": time, "report": report}
    problems = MOST * (1 - CURVE) * time / all_of_them
    whole = before + time + report
    # What does not end by the clock: checks, report, and the first round of a short run.
    open_ended = min(1.0, ((models > 1) * checked + report + (first if time == first else 0.0)) / whole)
    return Forecast(
        stages=stages,
        run_seconds=whole,
        run_seconds_interval=interval(whole, math.hypot(SPREAD, CHECK_SPREAD * open_ended)),
        pretrain_tokens=pretraining * state.speed,
        tokens_per_second=state.speed,
        problems=round(min(MOST, max(FIRST, problems))),
        samples=samples,
        calibration=engine_costs_here(compute_dtype()).source,
    )


def answers_seconds(state: SpeedrunState, problems: int, samples: int) -> float:
    """Of one model's answers to so many problems of each family."""
    config = ModelConfig.from_dict(MODEL | {"vocab_size": LARGEST + 300}, "speedrun")
    most = state.level.max_tokens
    lengths = Lengths(PROMPT, ANSWER_SHARE * most, most)
    parts = sampling_seconds(
        config, engine_costs_here(compute_dtype()), problems, problems * samples, MAX_NUM_SEQS, lengths
    )
    return len(state.environments) * sum(parts)


def forecast_table(found: Forecast) -> Table:
    """One row, for the terminal."""
    low, high = found.run_seconds_interval
    table = Table(box=None, pad_edge=False)
    for name in (*found.stages, "in all"):
        table.add_column(name, justify="right", style="dim")
    seconds = [f"{seconds:.0f} s" for seconds in found.stages.values()]
    table.add_row(*seconds, f"{found.run_seconds:.0f} s ({low:.0f} to {high:.0f})")
    return table


def keep_forecast(state: SpeedrunState, found: Forecast) -> None:
    write_text(state.run_dir / PREDICTION, strict_json.dumps(found.to_dict(), indent=2) + "\n")


def write_account(state: SpeedrunState, found: Forecast) -> None:
    """ledger.json of the whole run: its stages, with the tokens and FLOPs of their own ledgers."""
    ledger = Ledger(state.run_dir, found.to_dict(), compute_dtype())
    trained = dict(folders(state))
    for name, seconds in state.seconds.items():
        total: dict[str, Any] = {"tokens": 0, "flops": 0}
        if name in trained:
            total = json.loads((state.run_dir / trained[name] / "ledger.json").read_text())["total"]
        ledger.add(name, tokens=total["tokens"], flops=total["flops"], seconds=seconds)
    ledger.measured["run_seconds"] = state.budget.spent
    ledger.write()
