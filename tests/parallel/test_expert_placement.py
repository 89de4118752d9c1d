"""Experts with copies, before and after they move, against the same experts in one process."""

from dataclasses import replace

import pytest
import torch

from helpers.processes import run
from helpers.small_configs import GROUPED, LATENT
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.errors import UserError
from rorqual.model import Transformer
from rorqual.parallel.courier import Courier
from rorqual.parallel.expert_placement import ExpertPlacement, sources
from rorqual.parallel.mesh import build_mesh, single
from rorqual.precision.quantize import convert
from rorqual.sections import ParallelSection

E = 8
CONFIG = replace(LATENT, n_routed_experts=E, hidden_size=64, moe_intermediate_size=32)


def model():
    """Most tokens choose experts 6 and 7."""
    torch.manual_seed(0)
    made = Transformer(CONFIG).eval()
    with torch.no_grad():
        for layer in made.moe_layers():
            layer.gate.e_score_correction_bias[6:] = 0.5
    return made


def stored(path, weights):
    if weights == "fp8":
        return load_model(path, torch.float32, weights="fp8")
    return model() if weights is None else convert(model(), weights)


def tokens(rank, step):
    """Of a rank: none of the last one's in the first step."""
    count = 0 if rank == 3 and step == 0 else 5 + 3 * rank
    return torch.randn(1, count, CONFIG.hidden_size, generator=torch.Generator().manual_seed(10 * step + rank))


@torch.inference_mode()
def on_ranks(rank, path, weights, redundant, dispatch, per_node):
    ranks = torch.distributed.get_world_size()
    section = ParallelSection(data=ranks, experts=ranks, dispatch=dispatch, ranks_per_node=per_node)
    whole, spread = stored(path, weights), stored(path, weights)
    placement = ExpertPlacement(spread, build_mesh(section), Courier(), redundant)
    errors, balances, moved, loads, arrived = [], [], [], [], []
    for step in range(3):
        x, placed = tokens(rank, step), placement.placement.physical_to_logical
        for ours, theirs in zip(spread.moe_layers(), whole.moe_layers(), strict=True):
            found, expected = ours(x), theirs(x)
            errors.append(float((found - expected).norm() / max(1e-9, float(expected.norm()))))
        loads.append(torch.stack([d.load for d in placement.dispatchers]).tolist())
        arrived.append(placement.arrived())
        balances.append(placement.rebalance())
        moved.append(bool((placed != placement.placement.physical_to_logical).any()))
    slots = len(spread.moe_layers()[0].experts.down_proj)
    return {"errors": errors, "balances": balances, "moved": moved, "slots": slots, "loads": loads,
            "arrived": [*arrived, placement.arrived()]}  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "redundant", "dispatch", "per_node"),
    [(None, 8, "two-hop", 4), (None, 0, "all-to-all", 4), (None, 4, "two-hop", 2), ("int4", 8, "two-hop", 4),
     ("fp8", 4, "two-hop", 4)],
)  # fmt: skip
def test_outputs_are_those_of_one_process_also_after_experts_have_moved(
    tmp_path, weights, redundant, dispatch, per_node
):  # fmt: skip
    save_model(model(), tmp_path)
    found = run(4, on_ranks, tmp_path, weights, redundant, dispatch, per_node)
    for rank in found:
        assert max(rank["errors"]) < 1e-5
        assert rank["slots"] == (E + redundant) // 4
        assert rank["balances"] == found[0]["balances"]
        assert rank["moved"][0]  # the loads are uneven, the first placement is not
        assert rank["arrived"][-1] == [0, 0]  # since the last placement
        assert all(after <= before for before, after in rank["balances"])
    first = [torch.tensor(rank["loads"][0]) for rank in found]
    assert sum(first).sum(1).tolist() == [2 * (5 + 8 + 11)] * 2  # K = 2 for each of the tokens
    assert first[3].sum() == 0
    arrived = torch.tensor([rank["arrived"][1] for rank in found]).double()
    measured = float((arrived.amax(0) / arrived.mean(0)).mean())
    assert measured == pytest.approx(found[0]["balances"][1][0], rel=0 if redundant == 0 else 0.1)
    if redundant == 4:  # experts 6 and 7 have most of the load, and get copies
        before, after = found[0]["balances"][0]
        assert after < 1.1 < 1.5 < before


def test_a_slot_takes_its_expert_from_its_own_rank_or_from_the_holders_in_turn():
    assert sources([0, 1, 2, 2], [2, 1, 2, 0], own=2) == [2, 1, 2, 0]
    assert sources([0, 0, 1, 0], [1, 1, 0, 0], own=2) == [2, 2, 3, 3]
    assert sources([0, 0, 1, 1], [1, 1, 0, 0], own=2) == [2, 3, 0, 1]


def test_dense_models_are_refused():
    with pytest.raises(UserError, match="no routed experts"):
        ExpertPlacement(Transformer(GROUPED), single(), Courier())
