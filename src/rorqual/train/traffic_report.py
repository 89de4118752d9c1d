"""The end of a run of several processes: what they sent in a step, beside what is computed."""

from collections import Counter
from typing import Any

import torch

from rorqual.model.moe import MixtureOfExperts
from rorqual.parallel.cost import dispatch_bytes, sharding_bytes
from rorqual.plan.traffic import Link
from rorqual.train.trainer import Trainer

SHOWN = ("dispatch", "combine", "hidden states", "gradients", "weights")
LINKS: tuple[Link, ...] = ("between nodes", "within a node")


def traffic(trainer: Trainer, tokens: int, steps: int) -> dict[str, Any]:
    """Bytes of a step by operation and link, of all ranks together: counted and computed; called on all ranks.

    tokens: of all ranks in a step; steps: of this process, over which bytes were counted.
    """
    mesh, model = trainer.mesh, trainer.model
    layers = sum(isinstance(getattr(m, "mlp", None), MixtureOfExperts) for m in model.model.layers)
    own = tokens // (mesh.data.size * mesh.context.size)
    expected: Counter[tuple[str, Link]] = Counter(sharding_bytes(mesh, trainer.optimizer.parameters))
    itemsize = trainer.dtype.itemsize
    expected += dispatch_bytes(model.config, mesh, own, itemsize, layers, trainer.recompute == "full")
    keys: list[tuple[str, Link]] = [(what, link) for what in SHOWN for link in LINKS]
    rows = torch.tensor([[mesh.traffic.sent[key] / max(steps, 1), expected[key]] for key in keys], dtype=torch.float64)
    total = mesh.world.sum(rows, "report").tolist()
    hidden = mesh.world.sum(torch.tensor([trainer.courier.hidden]), "report") / mesh.section.processes
    return {
        "bytes_a_step": {
            f"{what}, {link}": {"counted": counted, "computed": computed}
            for (what, link), (counted, computed) in zip(keys, total, strict=True)
            if counted or computed
        },
        "travel_hidden": float(hidden),
    }


def table(found: dict[str, Any]) -> str:
    """As text for a person."""
    lines = [f"{'sent in a step, all processes':<34}{'counted':>12}{'computed':>12}"]
    for name, row in found["bytes_a_step"].items():
        lines.append(f"{name:<34}{_megabytes(row['counted']):>12}{_megabytes(row['computed']):>12}")
    lines.append(f"time of travel to experts that is hidden behind computation: {found['travel_hidden']:.0%}")
    return "\n".join(lines)


def _megabytes(number: float) -> str:
    return f"{number / 1e6:.3f} MB"
