"""The cost of steps on this machine: counts by hand, and costs that are found again."""

import math
import random

import pytest
import torch

from helpers.small_configs import LATENT
from rorqual.model import ModelConfig
from rorqual.plan.cost import flops_per_token, mtp_parameters, parameters
from rorqual.plan.cpu_time import Costs, Counts, costs_here, keep, step_counts
from rorqual.plan.fitting import fit

NAMES = list(Counts.__dataclass_fields__)
TRUE = Costs(1e-11, 2e-11, 3e-10, 1e-9, 5e-9, 1e-4, 2e-5, 4e-8, spread=0.1, source="")


@pytest.fixture(autouse=True)
def _kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RORQUAL_CALIBRATION", str(tmp_path / "calibration.json"))


def test_counts_of_a_step():
    config = ModelConfig(
        model_type="llama", vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4,
    )  # fmt: skip
    counts = step_counts(config, [(4, 16), (2, 16)], 4, ahead=False)
    assert counts.products + counts.attention == pytest.approx(96 * flops_per_token(config, 16))
    assert counts.logits == 96 * 100
    assert counts.parameters == parameters(config)[0]
    assert (counts.layers, counts.experts) == (2 * 3, 0)
    again = step_counts(config, [(4, 16), (2, 16)], 4, ahead=False, recompute="full")
    assert again.products == pytest.approx(counts.products * 4 / 3)
    # LoRA: no gradients of the weights, which are a third of a step's products.
    lora = step_counts(config, [(4, 16), (2, 16)], 4, ahead=False, adapters=123)
    assert (lora.products, lora.attention) == (pytest.approx(counts.products * 2 / 3), counts.attention)
    assert lora.parameters == 123
    # Muon updates the four matrices of attention and the three of the feed-forward part, of each layer.
    muon = step_counts(config, [(4, 16), (2, 16)], 4, ahead=False, muon=True)
    assert (counts.orthogonalised, muon.orthogonalised) == (0, 3 * (4 * 32 * 32 + 3 * 32 * 64))
    assert muon.products > counts.products


def test_counts_of_experts_and_multi_token_modules():
    config = LATENT
    counts = step_counts(config, [(1, 8)], 4, ahead=True)
    moe = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers + config.num_nextn_predict_layers))
    assert counts.experts == moe * config.n_routed_experts
    assert counts.parameters == parameters(config)[0] + mtp_parameters(config)


def measured(noise, count=30):
    generator = random.Random(0)
    found = []
    for _ in range(count):
        counts = Counts(**{name: 10 ** generator.uniform(0, 3) / getattr(TRUE, name) for name in NAMES})
        found.append((counts, TRUE.seconds(counts) * math.exp(generator.gauss(0, noise))))
    return found


def test_costs_are_found_again():
    found = fit(measured(0.0), "", Costs)
    for name in NAMES:
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)


def test_what_is_not_measured_stays_as_expected():
    """Costs of two counts that always come together, and of one that is always 0."""
    pairs = [(Counts(n, n, 0, 0, 0, 0, 0, 0), 3e-11 * n) for n in (1e9, 2e9, 4e9)]
    expected = {name: getattr(TRUE, name) for name in NAMES}
    found = fit(pairs, "", Costs, expected)
    assert (found.products, found.attention) == (pytest.approx(1e-11), pytest.approx(2e-11))
    assert found.kept == pytest.approx(TRUE.kept)
    assert fit(pairs, "", Costs, expected | {"attention": 1e-11}).products < 2e-11


def test_no_cost_is_negative_and_the_spread_is_the_noises():
    found = fit(measured(0.2, 200), "", Costs)
    assert all(getattr(found, name) >= 0 for name in NAMES)
    assert found.spread == pytest.approx(0.2, rel=0.2)
    inside = [low <= t <= high for c, t in measured(0.2, 200) for low, high in [found.interval(found.seconds(c))]]
    assert 0.7 < sum(inside) / len(inside) < 0.9


def test_costs_are_kept_for_a_machine_and_a_dtype(tmp_path):
    assert "not calibrated" in costs_here(torch.float32).source
    keep(TRUE, torch.float32)
    assert costs_here(torch.float32) == TRUE
    assert "not calibrated" in costs_here(torch.bfloat16).source
    (tmp_path / "calibration.json").write_text("{")  # damaged: as if there were none
    assert "not calibrated" in costs_here(torch.float32).source


def test_costs_of_another_machine_are_left_alone(monkeypatch):
    keep(TRUE, torch.float32)
    monkeypatch.setattr("rorqual.plan.measured_here.describe_machine", lambda: dict.fromkeys(
        ("processor", "threads", "compiled_functions", "torch"), "another"))  # fmt: skip
    assert "not calibrated" in costs_here(torch.float32).source


def test_muons_products():
    """Against torch's own count."""
    from torch.utils.flop_counter import FlopCounterMode

    from rorqual.model import Transformer
    from rorqual.model.parameter_kinds import is_hidden_matrix
    from rorqual.plan.optimizer_state import muon_flops
    from rorqual.train.muon import as_matrices, orthogonalise

    with FlopCounterMode(display=False) as counter:
        for name, p in Transformer(LATENT).named_parameters():
            if is_hidden_matrix(name, p):
                orthogonalise(as_matrices(name, p.detach()))
    assert muon_flops(LATENT) == pytest.approx(counter.get_total_flops(), rel=1e-6)
