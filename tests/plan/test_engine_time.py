"""Counts of the engine's work, by hand."""

from dataclasses import fields, replace

import pytest
import torch

from helpers.small_configs import GROUPED, LATENT
from rorqual.plan.engine_time import (
    EngineCosts,
    EngineCounts,
    decode_counts,
    engine_costs_here,
    keep_engine_costs,
    prefill_counts,
)

LAYER = 1024 + 2 * 512 + 1024 + 3 * 32 * 48  # weights of GROUPED's linears: queries, keys and values, output, SwiGLU
HEAD = 60 * 32


@pytest.fixture(autouse=True)
def _kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RORQUAL_CALIBRATION", str(tmp_path / "calibration.json"))


def test_a_decode_step():
    assert decode_counts(GROUPED, 3, 10) == EngineCounts(
        steps=1, layers=2, weights=2 * (LAYER + 64) + 32 + HEAD, products=3 * 2 * (2 * LAYER + HEAD),
        attention=3 * 10 * 2 * 4 * 4 * 8, logits=3 * 60,
    )  # fmt: skip


def test_prompts_are_computed_once_for_all_their_answers():
    found = prefill_counts(GROUPED, 2, 5, 6)
    assert found.products == 10 * 2 * 2 * LAYER + 2 * 2 * HEAD
    assert found.within == 2 * 2 * 4 * (5 * 5 / 2) * 2 * 2 * 8  # causal
    assert (found.steps, found.layers, found.prompts, found.logits, found.answers) == (1, 2, 4, 360, 6)
    assert prefill_counts(GROUPED, 2, 4096, 2).steps == 2  # a step takes 4096 tokens


def test_experts_that_are_chosen_are_read():
    """Half of four experts by a token, in two layers; each of two tokens leaves half of what the other leaves."""
    one, two = decode_counts(LATENT, 1, 0), decode_counts(LATENT, 2, 0)
    assert (one.experts, two.experts, one.mixtures) == (4, 6, 2)
    assert two.weights - one.weights == 2 * 3 * 32 * 16
    assert decode_counts(LATENT, 1, 7).attention == 7 * 3 * 4 * 2 * ((16 + 4) + 16)  # absorbed: latents of 16, and 4


def test_costs_of_weights_in_fp8_are_kept_apart():
    costs = EngineCosts(*range(1, len(fields(EngineCounts)) + 1), spread=0.1, source="")
    assert costs.seconds(EngineCounts(steps=1, layers=2)) == 5
    keep_engine_costs(costs, torch.float32)
    assert engine_costs_here(torch.float32) == costs
    assert "not calibrated" in engine_costs_here(torch.float32, fp8=True).source
    keep_engine_costs(replace(costs, steps=7), torch.float32, fp8=True)
    assert engine_costs_here(torch.float32, fp8=True).steps == 7
