"""Rows to experts without torch, against those counted from tensors."""

import subprocess
import sys

import pytest
import torch

from rorqual.plan import traffic
from rorqual.plan.expected_rows import SAMPLES, expected_rows, random_choices
from rorqual.plan.known_models import find_model

SHAPES = [(64, 8), (32, 8), (8, 8), (4, 8), (160, 8), (64, 72)]


def counted(config, chosen, ranks, per_node, dispatch):
    group = traffic.ExpertGroup(config.moe.n_routed_experts, ranks, min(per_node, ranks))
    none = torch.zeros(0, config.moe.num_experts_per_tok, dtype=torch.int64)
    rows = traffic.journey_rows([chosen, *[none] * (ranks - 1)], group, dispatch)
    return {link: n / SAMPLES for link, n in rows.items() if n}


@pytest.mark.parametrize("dispatch", ["two-hop", "all-to-all"])
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "deepseek-v2-lite"])
def test_rows_are_those_counted_from_tensors(name, dispatch):
    config = find_model(name)
    own = torch.tensor(random_choices(config))
    for ranks, per_node in SHAPES:
        if config.moe.n_routed_experts % ranks:
            continue
        found = {k: n for k, n in expected_rows(config, ranks, min(per_node, ranks), dispatch).items() if n}
        assert found == pytest.approx(counted(config, own, ranks, per_node, dispatch))
        routed = counted(config, traffic.random_choices(config), ranks, per_node, dispatch)
        assert found == pytest.approx(routed, rel=0.03), "as the router chooses"


def test_v3_reaches_four_nodes():
    """V3 §2.1.2: at most four; of eight, one is the token's own half of the time."""
    found = expected_rows(find_model("deepseek-v3"), 64, 8, "two-hop")
    assert found["between nodes"] == pytest.approx(3.5, abs=0.1)


def test_plans_do_without_torch():
    code = """
import sys
from rorqual.plan.chips import find_chip
from rorqual.plan.known_models import find_model
from rorqual.plan.rl_plan import Tuning, plan_rl
from rorqual.plan.serving_plan import Service, plan_serving
from rorqual.plan.training_plan import Question, plan_training
import rorqual.plan.plan_text
plan_training(Question(find_model("deepseek-v2-lite"), find_chip("h100"), 1e9, 8))
plan_rl(Tuning(find_model("deepseek-v2-lite"), find_chip("h100"), 8, steps=1))
plan_serving(Service(find_model("qwen2.5-7b"), find_chip("h100")))
print(sorted(sys.modules.keys() & {"torch", "numpy", "transformers"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
