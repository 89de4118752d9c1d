"""The ledger of a run: measured tokens, FLOPs and seconds of each stage, beside the predicted ones."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rorqual import strict_json
from rorqual.errors import UserError
from rorqual.files import read_json, write_text
from rorqual.plan.hardware import describe_machine, matrix_peak

PREDICTION = "plan.json"


def predicted_at_start(run_dir: Path, predict: Callable[[], Mapping[str, Any]], begins: bool) -> Mapping[str, Any]:
    """What was predicted when the run began, kept in its folder: a prediction made later would know more.

    Raises UserError where it cannot be written.
    """
    path = run_dir / PREDICTION
    if not begins:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a run of an earlier version
            return {}
        return found if isinstance(found, dict) else {}
    found = dict(predict())
    write_text(path, strict_json.dumps(found, indent=2) + "\n", then="then start again")
    return found


class Ledger:
    """Collects the stages' costs and writes run_dir/ledger.json."""

    def __init__(
        self, run_dir: Path, predicted: Mapping[str, object], dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        """`predicted`: the planner's tokens, flops, seconds … before the run.

        The utilisation is relative to the measured peak of `device` in `dtype`, the run's compute dtype.
        """
        self.path, self.predicted, self.dtype, self.device = Path(run_dir) / "ledger.json", predicted, dtype, device
        self.stages: dict[str, dict[str, float]] = {}
        self.joules: float | None = None  # None: the machine does not tell
        self.measured: dict[str, float] = {}  # what a prediction is about, by its name there; see `SCORED`

    def add(self, stage: str, *, tokens: float, flops: float, seconds: float) -> None:
        """Add to a stage's account; may be called many times."""
        account = self.stages.setdefault(stage, {"tokens": 0, "flops": 0, "seconds": 0})
        for key, value in (("tokens", tokens), ("flops", flops), ("seconds", seconds)):
            account[key] += value

    def to_dict(self) -> dict[str, object]:
        """Stages and total: tokens, FLOPs, seconds, and utilisation (FLOP/s over the measured matmul peak)."""
        peak = matrix_peak(self.dtype, self.device)
        total = {key: sum(s[key] for s in self.stages.values()) for key in ("tokens", "flops", "seconds")}
        accounts = {
            name: account | {"utilisation": account["flops"] / (peak * account["seconds"]) if account["seconds"] else 0}
            for name, account in {**self.stages, "total": total}.items()
        }
        return {
            "stages": {name: a for name, a in accounts.items() if name != "total"},
            "total": accounts["total"],
            "joules": self.joules,
            "measured": self.measured,
            "predicted": self.predicted,
            "machine": describe_machine() | {"matrix_peak_flops": peak},
        }

    def write(self) -> Path:
        """Write ledger.json atomically. Raises UserError."""
        write_text(self.path, strict_json.dumps(self.to_dict(), indent=2) + "\n", then="then continue with --resume")
        return self.path


# What a prediction is scored by, the first that ledger and prediction have, with its unit: a whole run's time where it
# is to end by itself, a step's where steps are of one kind, else speed. Each has an interval, NAME_interval.
SCORED = {"run_seconds": "s", "seconds_a_step": "s a step", "tokens_per_second": "tokens/s"}


@dataclass(frozen=True)
class Account:
    """What a run's ledger.json says, beside what was predicted."""

    run: str
    kinds: tuple[str, ...]  # stages
    tokens: float
    flops: float
    seconds: float
    utilisation: float
    joules: float | None  # None: the machine did not tell
    unit: str  # of the next three
    measured: float | None
    predicted: float | None  # None: nothing was
    interval: tuple[float, float] | None  # 80 %
    counted: bool = False  # in the ledger of a run that it is part of

    @property
    def error(self) -> float | None:
        """Of the predicted time, against the measured one: +0.1 is a tenth too long."""
        if not self.measured or not self.predicted:
            return None
        return (self.measured / self.predicted if self.unit == "tokens/s" else self.predicted / self.measured) - 1

    @property
    def inside(self) -> bool | None:
        """Whether the measured value lay within the stated interval."""
        if self.measured is None or self.interval is None:
            return None
        return self.interval[0] <= self.measured <= self.interval[1]


def read_accounts(folder: Path) -> list[Account]:
    """Of all runs in a folder and below it. Raises UserError where there is none, or a damaged one."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a run, or of several")
    paths = sorted(folder.rglob("ledger.json"))
    wholes = {path.parent for path in paths}
    found = [replace(_account(path, folder), counted=not wholes.isdisjoint(path.parent.parents)) for path in paths]
    if not found:
        raise UserError(f"{folder} holds no ledger.json; runs write it when they end")
    return found


def _account(path: Path, folder: Path) -> Account:
    raw = read_json(path, "remove it, or restore it")
    try:
        assert isinstance(raw, dict)
        total, predicted, stages = raw["total"], raw.get("predicted") or {}, raw["stages"]
        own = raw.get("measured") or {}
        assert isinstance(own, dict)
        assert isinstance(total, dict)
        assert isinstance(predicted, dict)
        assert isinstance(stages, dict)
        seconds = _number(total["seconds"])
        measured: dict[str, Any] = {"tokens_per_second": _number(total["tokens"]) / (seconds or math.inf)} | own
        name = next((name for name in SCORED if name in measured and name in predicted), "tokens_per_second")
        value, interval = predicted.get(name), predicted.get(f"{name}_interval")
        return Account(
            run=str(path.parent.relative_to(folder)) if path.parent != folder else folder.resolve().name,
            kinds=tuple(stages),
            tokens=_number(total["tokens"]),
            flops=_number(total["flops"]),
            seconds=seconds,
            utilisation=_number(total["utilisation"]),
            joules=None if raw.get("joules") is None else _number(raw["joules"]),
            unit=SCORED[name],
            measured=_number(measured[name]) or None,
            predicted=None if value is None else _number(value),
            interval=(_number(interval[0]), _number(interval[1])) if isinstance(interval, list) else None,
        )
    except (KeyError, AssertionError, IndexError) as e:
        raise UserError(f"{path} is damaged ({e or 'a field has another type'}); remove it, or restore it") from None


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    assert not isinstance(value, bool)
    return float(value)
