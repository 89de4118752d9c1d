"""The end of a run of several processes: what they sent and the pipeline's bubble, beside what is computed."""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from rorqual.extras import MissingExtra
from rorqual.model.moe import MixtureOfExperts
from rorqual.model.transformer import Block
from rorqual.parallel.context import KEYS
from rorqual.parallel.cost import Bytes, context_bytes, dispatch_bytes, sharding_bytes, stage_bytes
from rorqual.parallel.draw import draw
from rorqual.parallel.mesh import Mesh
from rorqual.parallel.parcels import EMBEDDINGS, HIDDEN
from rorqual.plan.expected_rows import Link
from rorqual.plan.simulate import Timeline, Times, simulate
from rorqual.train.trainer import Trainer

PIPELINE = (HIDDEN, EMBEDDINGS, f"gradients of {HIDDEN}", f"gradients of {EMBEDDINGS}")
SHOWN = ("dispatch", "combine", KEYS, f"gradients of {KEYS}", *PIPELINE, "gradients", "weights")
LINKS: tuple[Link, ...] = ("between nodes", "within a node")


def computed(trainer: Trainer, tokens: int, meshes: Iterable[Mesh]) -> list[Bytes]:
    """Of a step, sent by each of some ranks with the trainer's stage. tokens: of each rank."""
    config, pipeline, optimizer = trainer.model.config, trainer.pipeline, trainer.optimizer
    itemsize, recompute = trainer.dtype.itemsize, trainer.recompute
    blocks = [module for module in trainer.model.model.layers if isinstance(module, Block)]  # of this stage
    mixtures = sum(isinstance(block.mlp, MixtureOfExperts) for block in blocks)
    travel = dispatch_bytes(config, trainer.mesh, tokens, itemsize, mixtures, recompute == "full")
    again = recompute == "full" or (recompute == "v3" and config.is_mla)
    hidden = tokens * config.hidden_size * itemsize
    layers = [parameters for _, parameters in optimizer.layers.modules] if optimizer.layers else []
    meshes = list(meshes)
    sharding = sharding_bytes(meshes, optimizer.sharding, optimizer.parameters, layers, trainer.micro_batches)
    return [
        travel
        + context_bytes(config, mesh, tokens, itemsize, len(blocks), again)
        + rows
        + (stage_bytes(mesh, pipeline.flow, hidden) if pipeline else Counter())
        for mesh, rows in zip(meshes, sharding, strict=True)
    ]


def traffic(trainer: Trainer, tokens: int, steps: int) -> dict[str, Any]:
    """Bytes of a step by operation and link, of all ranks together: counted and computed; called on all ranks.

    tokens: of all ranks in a step; steps: of this process, over which bytes were counted.
    """
    mesh, uncounted = trainer.mesh, trainer.mesh.section.by_deep_ep
    (expected,) = computed(trainer, tokens // (mesh.data.size * mesh.context.size), [mesh])
    keys: list[tuple[str, Link]] = [(what, link) for what in SHOWN for link in LINKS]
    rows = torch.tensor([[mesh.traffic.sent[key] / max(steps, 1), expected[key]] for key in keys], dtype=torch.float64)
    total = mesh.world.sum(rows, "report").tolist()
    hidden = mesh.world.sum(torch.tensor([trainer.courier.hidden]), "report") / mesh.section.processes
    return {
        "bytes_a_step": {
            f"{what}, {link}": {"counted": counted, "computed": computed}
            for (what, link), (counted, computed) in zip(keys, total, strict=True)
            if counted or (computed and not (what in ("dispatch", "combine") and uncounted))
        },
        "travel_hidden": float(hidden),
    }


def bubble(trainer: Trainer, picture: Path) -> dict[str, float]:
    """The newest step's pipeline: the share of the ranks' time without work, as it was and as the schedule has it with
    the measured times of its actions; empty without a pipeline. Called on all ranks; the first draws both.
    """
    pipeline, group = trainer.pipeline, trainer.mesh.pipeline
    if pipeline is None:
        return {}
    schedule, kinds = pipeline.schedule, ("F", "B", "I", "W", "FB")
    own = torch.zeros(len(kinds), schedule.stages, dtype=torch.float64)
    for (kind, stage), seconds in pipeline.measured_times().items():
        own[kinds.index(kind), stage] = seconds
    times = Times(*group.sum(own, "report").tolist())
    spans = torch.zeros(max(map(len, schedule.steps)), 2, dtype=torch.float64)
    mine = torch.tensor(pipeline.last_timeline.spans[0], dtype=torch.float64)
    spans[: len(mine)] = mine
    everywhere = [part[: len(steps)] for part, steps in zip(group.gather(spans, "report"), schedule.steps, strict=True)]
    measured = Timeline(tuple(tuple((a, b) for a, b in part.tolist()) for part in everywhere))
    simulated = simulate(schedule, times)
    if trainer.mesh.rank == 0:
        with suppress(MissingExtra):
            picture.parent.mkdir(exist_ok=True)
            draw({"as it ran": (schedule, measured), "simulated": (schedule, simulated)}, picture)
    return {"measured": measured.bubble_share, "simulated": simulated.bubble_share}


def table(found: dict[str, Any]) -> str:
    """As text for a person."""
    lines = [f"{'sent in a step, all processes':<44}{'counted':>12}{'computed':>12}"]
    for name, row in found["bytes_a_step"].items():
        lines.append(f"{name:<44}{_megabytes(row['counted']):>12}{_megabytes(row['computed']):>12}")
    lines.append(f"time of travel to experts that is hidden behind computation: {found['travel_hidden']:.0%}")
    if shares := found["bubble"]:
        lines.append(f"pipeline bubble: {shares['measured']:.0%}, simulated {shares['simulated']:.0%}")
    return "\n".join(lines)


def _megabytes(number: float) -> str:
    return f"{number / 1e6:.3f} MB"
