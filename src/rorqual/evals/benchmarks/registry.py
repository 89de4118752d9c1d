"""Published benchmarks by their names."""

from typing import Any

from rorqual.errors import UserError
from rorqual.evals.benchmarks.arc import ARC
from rorqual.evals.benchmarks.benchmark import Benchmark
from rorqual.evals.benchmarks.bfcl import BFCL
from rorqual.evals.benchmarks.choice import MMLU, GPQADiamond, MMLUPro
from rorqual.evals.benchmarks.ifeval import IFEval
from rorqual.evals.benchmarks.livecodebench import LiveCodeBench
from rorqual.evals.benchmarks.mathematics import AIME24, AIME25, GSM8K, MATH500
from rorqual.evals.humaneval import HumanEval

BENCHMARKS: dict[str, type[Benchmark]] = {
    made.name: made
    for made in (
        AIME24, AIME25, MATH500, GPQADiamond, MMLU, MMLUPro, GSM8K, LiveCodeBench, HumanEval, IFEval, ARC, BFCL,
    )
}  # fmt: skip
OPTIONS = {"livecodebench": ("start", "end"), "bfcl": ("categories",)}


def open_benchmark(name: str, options: dict[str, Any], data: str | None = None) -> Benchmark:
    """The benchmark `name`. Raises UserError for an option that it does not have, and as its constructor."""
    known = OPTIONS.get(name, ())
    for option in options:
        if option not in known:
            has = f"only {', '.join(known)}" if known else "no options"
            raise UserError(f"task {name}:{option}=…: {name} has {has}; write {name}")
    return BENCHMARKS[name](data, **options)
