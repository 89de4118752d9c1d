"""Expert parallelism for serving: busy experts have copies, and where all of them live follows the load (V3 §3.4).

A slot holds one copy of one expert of a layer; every rank has as many slots, numbered rank by rank. Which copy a token
takes is a matter of its number and its rank alone.

E experts and R slots a layer, N tokens here, K experts a token.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rorqual.errors import UserError
from rorqual.kernels.fp8_weight import FP8Weight
from rorqual.kernels.quantized_linear import QuantizedWeight
from rorqual.model import ModelConfig, Transformer
from rorqual.model.moe import Dispatched, Experts, MixtureOfExperts
from rorqual.parallel.balance import Placement, balance_of, rebalance_experts
from rorqual.parallel.courier import Courier
from rorqual.parallel.experts import ExpertParallel
from rorqual.parallel.mesh import Mesh
from rorqual.shapes import Float, Int, Int64

Weight = Tensor | QuantizedWeight | FP8Weight


class PlacedExperts(ExpertParallel):
    """A TokenDispatcher for experts with copies; it counts what it dispatches."""

    def __init__(self, mesh: Mesh, experts: int, slots: int, courier: Courier, device: torch.device) -> None:
        super().__init__(mesh, slots, courier)
        # Tokens of this rank for each expert, and tokens of any rank for the slots here, since the last placement.
        self.load, self.arrived = torch.zeros(experts, dtype=torch.int64, device=device), torch.zeros((), device=device)
        self.slots, self.copies = torch.empty(0), torch.empty(0)

    def place(self, slots: Int64[Tensor, "E most"], copies: Int64[Tensor, " E"]) -> None:
        """slots: of each expert, then -1. The counts begin anew."""
        self.slots, self.copies = slots.to(self.load.device), copies.to(self.load.device)
        self.load.zero_()
        self.arrived.zero_()

    def __call__(
        self,
        experts: Experts,
        x: Float[Tensor, "N D"],
        weights: Float[Tensor, "N K"],
        chosen: Int[Tensor, "N K"],
        shared: Callable[[Tensor], Tensor] | None = None,
    ) -> Dispatched:
        load = chosen.flatten().bincount(minlength=len(self.load))
        self.load += load
        turn = torch.arange(len(chosen), device=chosen.device).unsqueeze(1) + self.group.place
        out, _ = super().__call__(experts, x, weights, self.slots[chosen, turn % self.copies[chosen]], shared)
        return out, load

    def _compute(self, experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        self.arrived += (chosen // self.own == self.group.place).sum()
        return super()._compute(experts, x, weights, chosen)


class ExpertPlacement:
    """Which slot holds which expert, for all layers of a model, of whose experts this rank keeps those in its slots."""

    def __init__(self, model: Transformer, mesh: Mesh, courier: Courier, redundant: int = 0) -> None:
        """redundant: slots a layer beyond one for every expert. The first placement supposes even loads. Raises as
        `check_slots`.
        """
        self.mesh, self.group = mesh, mesh.experts
        check_slots(model.config, self.group.size, redundant)
        experts = model.config.moe.n_routed_experts
        self.slots, self.groups = experts + redundant, model.config.moe.n_group
        self.layers = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts)]
        self.dispatchers = [
            PlacedExperts(mesh, experts, self.slots, courier, layer.gate.weight.device) for layer in self.layers
        ]
        self.placement = self._best(torch.ones(len(self.layers), experts))
        own = slice(self._own * self.group.place, self._own * (self.group.place + 1))
        for layer, held in zip(self.layers, self.placement.physical_to_logical[:, own], strict=True):
            _change(layer.experts, lambda rows, held=held: rows[held.to(rows.device)])
        for layer, dispatcher in zip(self.layers, self.dispatchers, strict=True):
            layer.dispatcher = dispatcher
        self._announce()

    @property
    def _own(self) -> int:
        """Slots a rank."""
        return self.slots // self.group.size

    def arrived(self) -> list[int]:
        """Tokens that came to the experts here since the last placement, by layer."""
        return torch.stack([d.arrived for d in self.dispatchers]).long().tolist()

    @torch.no_grad()
    def rebalance(self) -> tuple[float, float]:
        """Place the experts for the loads measured since the last placement → the mean balance of these loads over the
        layers (`balance_of`), as it was and as it is now.

        All ranks call it together, between two steps. Weights move between ranks, a layer at a time.
        """
        load = self.group.sum(torch.stack([d.load for d in self.dispatchers]), "expert loads").cpu()
        old, self.placement = self.placement, self._best(load)
        for layer, before, after in zip(
            self.layers, old.physical_to_logical.tolist(), self.placement.physical_to_logical.tolist(), strict=True
        ):
            self._move(layer.experts, sources(before, after, self._own))
        self._announce()
        before, after = (
            float(balance_of(load, p.physical_to_logical, p.copies, self.group.size).mean())
            for p in (old, self.placement)
        )
        return before, after

    def _best(self, load: Tensor) -> Placement:
        return rebalance_experts(load, self.slots, self.groups, self.mesh.rail.size, self.group.size)

    def _announce(self) -> None:
        for i, dispatcher in enumerate(self.dispatchers):
            dispatcher.place(self.placement.logical_to_physical[i], self.placement.copies[i])

    def _move(self, experts: Experts, source: Sequence[int]) -> None:
        """source: the old slot that each new one takes its weights from."""
        own, here, ranks = self._own, self.group.place, range(self.group.size)
        givers = [slot // own for slot in source]
        given = [slot - own * here for slot, giver in zip(source, givers, strict=True) if giver == here]
        send = [givers[own * p : own * (p + 1)].count(here) for p in ranks]
        mine = givers[own * here : own * (here + 1)]
        order = torch.tensor(sorted(range(own), key=mine.__getitem__)).argsort()  # from arrival to slot

        def travel(rows: Tensor) -> Tensor:
            flat = rows[given].flatten(1).contiguous()
            arrived = self.group.all_to_all(flat.view(torch.uint8), send, [mine.count(p) for p in ranks], "experts")
            return arrived[order.to(arrived.device)].view(rows.dtype).view(rows.shape)

        _change(experts, travel)


def check_slots(config: ModelConfig, ranks: int, redundant: int) -> None:
    """Raises UserError for a model without routed experts, and where slots cannot be spread evenly."""
    if not config.n_routed_experts:
        raise UserError("experts: this model has no routed experts that processes could share; leave it out")
    if redundant < 0:
        raise UserError(f"redundant_experts = {redundant}: must be at least 0")
    if (config.n_routed_experts + redundant) % ranks:
        raise UserError(
            f"redundant_experts = {redundant}: {config.n_routed_experts} experts a layer and {redundant} copies cannot "
            f"be spread evenly over {ranks} processes; make it {-config.n_routed_experts % ranks} or that and a "
            f"multiple of {ranks}"
        )


def sources(before: Sequence[int], after: Sequence[int], own: int) -> list[int]:
    """The old slot from which each new one takes its expert, given the experts in all slots: one of the same rank if it
    holds the expert, else the expert's old slots in turn. own: slots a rank.
    """
    holders: dict[int, list[int]] = defaultdict(list)
    for slot, expert in enumerate(before):
        holders[expert].append(slot)
    found: list[int] = []
    for slot, expert in enumerate(after):
        near = [h for h in holders[expert] if h // own == slot // own]
        found.append(near[0] if near else holders[expert][slot % len(holders[expert])])
    return found


def _change(experts: Experts, change: Callable[[Tensor], Tensor]) -> None:
    """Replace the tensors [experts, …] that the weights of a layer's experts consist of."""
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, _changed(getattr(experts, name), change))


def _changed(weight: Weight, change: Callable[[Tensor], Tensor]) -> Weight:
    if isinstance(weight, QuantizedWeight):
        channels = None if weight.channels is None else change(weight.channels)
        return replace(weight, data=change(weight.data), channels=channels)
    if isinstance(weight, FP8Weight):
        return replace(weight, codes=change(weight.codes), scales=change(weight.scales))
    return nn.Parameter(change(weight.detach()), requires_grad=False)
