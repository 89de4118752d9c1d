"""Expert parallelism by DeepEP, of which a stand-in computes what it documents (helpers/fake_deep_ep.py)."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from helpers import fake_deep_ep, simulated_gpu
from helpers.processes import run
from helpers.training import part, rows_of, trainer_of
from rorqual.errors import UserError
from rorqual.parallel.courier import Courier
from rorqual.parallel.deep_ep import DeepEPJourney, check_deep_ep
from rorqual.parallel.group import CommunicationError, Group, Traffic
from rorqual.parallel.mesh import build_mesh
from rorqual.parallel.watchdog import Watchdog
from rorqual.sections import ParallelSection


def on_ranks(rank, kind):
    """Two steps, the second of more tokens → losses, weights and buffers."""
    device = simulated_gpu.install()
    fake_deep_ep.install()
    mesh = build_mesh(ParallelSection(data=2, experts=2, dispatch=kind))
    found = trainer_of(mesh, trainer={"device": device, "dtype": "bfloat16"})
    losses = []
    for step, rows in enumerate((1, 2)):
        own = part(rows_of(step, 2 * rows), slice(rank * rows, (rank + 1) * rows))
        losses.append(found.step([own], 0.1).loss)
    found.close()
    weights = {n: p.detach().float().cpu().clone() for n, p in found.model.named_parameters()}
    return losses, weights, [(b.tokens, b.destroyed) for b in fake_deep_ep.buffers]


@pytest.mark.parametrize("kind", ["deepep", pytest.param("deepep-fp8", marks=pytest.mark.slow)])
def test_steps_are_those_of_our_own_hops(kind):
    ours = run(2, on_ranks, kind.replace("deepep", "two-hop"))
    theirs = run(2, on_ranks, kind)
    for (losses, weights, _), (found, moved, buffers) in zip(ours, theirs, strict=True):
        assert found == pytest.approx(losses, rel=2e-3)
        for name, w in weights.items():
            assert (moved[name] - w).norm() <= 0.01 * w.norm(), name
        # One for all layers, with the tokens of a micro-batch; a larger one when needed. None is left at the end.
        assert buffers == [(12, True), (24, True)]


@pytest.mark.parametrize(
    ("dtype", "device", "capability", "said"),
    [
        (torch.bfloat16, "cpu", (9, 0), "choose two-hop on a CPU"),
        (torch.bfloat16, "cuda", (8, 0), "needs Hopper or later"),
        (torch.float32, "cuda", (9, 0), "DeepEP sums in BF16"),
        (torch.bfloat16, "cuda", (9, 0), "not installed here; .* or choose two-hop"),
    ],
)
def test_what_it_does_not_take_is_refused(monkeypatch, dtype, device, capability, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    section = ParallelSection(dispatch="deepep-fp8")
    with pytest.raises(UserError, match=said):
        check_deep_ep(section, dtype, torch.device(device))
    check_deep_ep(ParallelSection(dispatch="two-hop-fp8"), dtype, torch.device(device))
    check_deep_ep(section, dtype, torch.device("meta"))


def test_what_fails_within_the_library_is_named():
    class Buffer:
        def dispatch(self, *_, **__):
            raise RuntimeError("DeepEP error: timeout")

    group = Group(None, (0, 1), 0, 2, Traffic(step=3), Watchdog(0, timedelta(seconds=10)))
    library = SimpleNamespace(group=group, fp8=False)
    journey = DeepEPJourney(Courier(), False, torch.bfloat16, library=library, buffer=Buffer())
    journey.handle = SimpleNamespace(num_sms=6)
    with pytest.raises(CommunicationError, match=r"rank 0, step 3: dispatch among ranks 0, 1 .*DeepEP error: timeout"):
        journey.there(torch.ones(2, 4))
