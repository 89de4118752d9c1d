"""A rank of benchmarks/dispatch.py: `python dispatch_ranks.py SETTINGS`, with torchrun's variables.

All ranks train the same small model with the experts spread over them, and the contestants take turns in the same
processes. All compute in FP32 or BF16, whichever the machine is faster at; rows travel in BF16 (or FP8) for every
contestant, so that none gains from the size of FP32. Tokens choose the experts that they choose in one process: with
its own rounding each contestant would choose a few others. Gradients of replicated weights are not summed.
"""

import ctypes
import itertools
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from common import fastest, take_turns
from nodes import delayed, wire_bytes
from rorqual.model import ModelConfig, Transformer
from rorqual.model.moe import Dispatched, Experts, Router
from rorqual.parallel.courier import Courier
from rorqual.parallel.experts import ExpertParallel, spread_experts
from rorqual.parallel.mesh import Mesh, build_mesh
from rorqual.plan.traffic import ExpertGroup, journey_bytes
from rorqual.sections import ParallelSection
from rorqual.train import set_seed
from workers import PR_SET_PDEATHSIG

KINDS = {"plain": "all-to-all", "two-hop": "two-hop", "two-hop FP8": "two-hop-fp8"}
OVERLAP = ", overlap"
CONTESTANTS = [kind + overlap for kind in KINDS for overlap in ("", OVERLAP)]


@dataclass(frozen=True)
class Settings:
    model: dict[str, Any]
    ranks: int
    per_node: int
    micro_batches: int
    sequences: int  # of a micro-batch
    length: int
    rounds: int
    rate: float  # bit/s of a node's link
    real: bool  # the link is there; otherwise ranks wait before they send
    out: str  # where rank 0 writes what was found


class Travel(ExpertParallel):
    """Rows travel in BF16, whatever is computed in. `chosen`: the routing of each micro-batch."""

    def __init__(self, mesh: Mesh, experts: int, courier: Courier) -> None:
        super().__init__(mesh, experts, courier)
        self.chosen: list[Tensor] = []

    def __call__(
        self,
        experts: Experts,
        x: Tensor,
        weights: Tensor,
        chosen: Tensor,
        shared: Callable[[Tensor], Tensor] | None = None,
    ) -> Dispatched:
        self.chosen.append(chosen)
        beside = None if shared is None else lambda _: shared(x)
        out, load = super().__call__(experts, x.to(torch.bfloat16), weights, chosen, beside)
        return out.to(x.dtype), load

    def _compute(self, experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return super()._compute(experts, x.to(experts.down_proj.dtype), weights, chosen).to(x.dtype)


class Contestant:
    def __init__(self, name: str, model: Transformer, mesh: Mesh, batches: Sequence[Tensor]) -> None:
        kind = name.removesuffix(OVERLAP)
        section = mesh.section.model_copy(update={"dispatch": KINDS[kind]})
        self.courier = Courier(background=name.endswith(OVERLAP))
        self.model, self.batches, self.kind = model, batches, section.dispatch
        experts = model.config.moe.n_routed_experts
        self.dispatchers = [Travel(replace(mesh, section=section), experts, self.courier) for _ in model.moe_layers()]
        self.core_seconds = 0.0  # of this rank's threads

    def train(self) -> list[float]:
        """Losses of a step."""
        for layer, dispatcher in zip(self.model.moe_layers(), self.dispatchers, strict=True):
            layer.dispatcher = dispatcher
            dispatcher.chosen.clear()
        return train(self.model, self.batches, self.courier)

    def seconds(self) -> float:
        dist.barrier()
        start, busy = time.perf_counter(), time.process_time()
        self.train()
        self.core_seconds += time.process_time() - busy
        dist.barrier()
        return time.perf_counter() - start


def train(model: Transformer, batches: Sequence[Tensor], courier: Courier) -> list[float]:
    """Forward and backward of every micro-batch; a forward overlaps the backward of the micro-batch before."""

    def forward(tokens: Tensor) -> Tensor:
        logits = model.logits(tokens[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / len(batches)

    model.zero_grad()
    losses: list[float] = []
    before: Tensor | None = None
    for tokens in batches:
        if before is None:
            loss = forward(tokens)
        elif courier.background:
            _, loss = courier.together(before.backward, lambda tokens=tokens: forward(tokens))
        else:
            before.backward()
            loss = forward(tokens)
        losses.append(loss.item())
        before = loss
    assert before is not None
    before.backward()
    return losses


def keep_choices(router: Router, micro_batches: int) -> None:
    """The experts that tokens choose in the first step are chosen in every other."""
    select = router._selection_scores
    kept: list[Tensor] = []
    calls = itertools.count()

    def selection_scores(scores: Tensor) -> Tensor:
        call = next(calls)
        if call < micro_batches:
            kept.append(select(scores))
        return kept[call % micro_batches]

    router._selection_scores = selection_scores


def gradients(model: Transformer) -> Tensor:
    """Of all but routed experts: those of this rank's tokens alone."""
    found = [p.grad for name, p in model.named_parameters() if ".mlp.experts." not in name and p.grad is not None]
    return torch.cat([g.flatten().float() for g in found])


def gather(value: Any) -> list[Any]:
    """The value of every rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def link_rate(mesh: Mesh, nbytes: int) -> float:
    """bit/s that a node's ranks send to the next node together."""
    group = mesh.experts
    to, frm = ((group.place + step * group.ranks_per_node) % group.size for step in (1, -1))
    rows = torch.zeros(nbytes, 1, dtype=torch.uint8)
    send, receive = ([nbytes * (place == other) for place in range(group.size)] for other in (to, frm))
    seconds: list[float] = []
    for _ in range(3):
        dist.barrier()
        start = time.perf_counter()
        group.all_to_all(rows, send, receive, "link")
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return nbytes * group.ranks_per_node * 8 / min(seconds)


def check(contestant: Contestant, mesh: Mesh, expected: tuple[list[float], Tensor], experts: int) -> dict[str, Any]:
    """A step's bytes, counted, computed from its routing and seen on the wire; its errors against one process."""
    dist.barrier()
    mesh.traffic.sent.clear()
    before = wire_bytes()
    dist.barrier()
    losses = contestant.train()
    dist.barrier()
    after = wire_bytes()
    chosen = [c for dispatcher in contestant.dispatchers for c in dispatcher.chosen]
    group = ExpertGroup(experts, mesh.experts.size, mesh.experts.ranks_per_node)
    analytic = Counter[tuple[str, str]]()
    for at_ranks in zip(*gather(chosen), strict=True):  # a layer and micro-batch
        hidden = contestant.model.config.hidden_size
        analytic += journey_bytes(at_ranks, group, contestant.kind, hidden, 2, passes=(False, True))
    counted = sum((Counter(sent) for sent in gather(dict(mesh.traffic.sent))), Counter[tuple[str, str]]())
    assert counted == analytic, f"counted {counted}, and the routing gives {analytic}"
    local_first = mesh.rank % mesh.experts.ranks_per_node == 0
    wire = gather(after - before if local_first and after is not None and before is not None else 0)
    error = (gradients(contestant.model) - expected[1]).norm() / expected[1].norm()
    loss_error = max(abs(a / b - 1) for a, b in zip(losses, expected[0], strict=True))
    return {
        "bytes": {f"{what}, {link}": n for (what, link), n in sorted(counted.items())},
        "between_nodes": sum(n for (_, link), n in counted.items() if link == "between nodes"),
        "within_a_node": sum(n for (_, link), n in counted.items() if link == "within a node"),
        "on_the_wire": sum(wire) or None,
        "gradient_error": max(gather(error.item())),
        "loss_error": max(gather(loss_error)),
    }


def main() -> None:
    if sys.platform == "linux":  # a benchmark that is killed leaves nobody behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    settings = Settings(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    section = ParallelSection(data=settings.ranks, experts=settings.ranks, ranks_per_node=settings.per_node)
    mesh = build_mesh(section)
    if not settings.real:
        mesh = delayed(mesh, settings.rate)
    set_seed(0)
    config = ModelConfig(model_type="deepseek_v3", **settings.model)
    model = Transformer(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, fastest()))
    generator = torch.Generator().manual_seed(mesh.rank)
    shape = (settings.micro_batches, settings.sequences, settings.length + 1)
    batches = list(torch.randint(config.vocab_size, shape, generator=generator))

    for layer in model.moe_layers():
        keep_choices(layer.gate, settings.micro_batches)
    expected = train(model, batches, Courier(background=False)), gradients(model)
    experts = config.moe.n_routed_experts
    spread_experts(model, mesh, Courier(background=False))
    rate = link_rate(mesh, round(settings.rate / 8 / settings.per_node / 4))
    contestants = {name: Contestant(name, model, mesh, batches) for name in CONTESTANTS}
    found = {name: check(contestant, mesh, expected, experts) for name, contestant in contestants.items()}
    for contestant in contestants.values():  # the step above has warmed it up
        contestant.courier.travelled = contestant.courier.waited = 0.0
    seconds = take_turns({name: contestant.seconds for name, contestant in contestants.items()}, settings.rounds)
    for name, contestant in contestants.items():
        courier = contestant.courier
        travelled, waited = (sum(gather(s)) for s in (courier.travelled, courier.waited))
        found[name] |= {
            "seconds": seconds[name],
            "core_seconds": sum(gather(contestant.core_seconds)) / settings.rounds,
            "travel_seconds": travelled / settings.ranks / settings.rounds,
            "waited_seconds": waited / settings.ranks / settings.rounds,
        }
        courier.close()
    if mesh.rank == 0:
        Path(settings.out).write_text(json.dumps({"link_rate": rate, "contestants": found}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
