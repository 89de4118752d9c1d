"""A distillation's plan on this machine, with an engine whose steps take a second and nothing else."""

import pytest

from helpers.small_configs import GROUPED
from rorqual.plan import distill_here
from rorqual.plan.distill_here import answers_seconds, training_rows
from rorqual.plan.engine_time import EngineCosts
from rorqual.plan.request import DistillRequest


def asked(**changes):
    sizes = {"problems": 64, "samples": 2, "prompt": 9, "answer": 20, "limit": 20, "keep": 1, "correct": 0.5}
    return DistillRequest.model_validate({"kind": "distill", "gpu": "cpu", "teacher": "any", **sizes, **changes})


@pytest.mark.parametrize(("problems", "calls"), [(16, 1), (64, 1), (128, 2)])
def test_calls_follow_each_other(monkeypatch, problems, calls):
    """A call writes until its longest answer ends: its prompts are one step, and each token is another."""
    costs = dict.fromkeys(EngineCosts.__dataclass_fields__, 0.0) | {"steps": 1.0, "spread": 0.1, "source": "test"}
    monkeypatch.setattr(distill_here, "engine_costs_here", lambda dtype: EngineCosts(**costs))
    assert answers_seconds(asked(problems=problems), GROUPED) == pytest.approx(calls * (1 + 20))


def test_rows_are_of_the_examples_that_are_kept():
    assert training_rows(asked(), 29) == 32  # half of the problems have an example, of 29 tokens
    assert training_rows(asked(keep=4), 29) == 64  # of two samples no more than two are kept
    assert training_rows(asked(correct=0.001), 512) == 1
