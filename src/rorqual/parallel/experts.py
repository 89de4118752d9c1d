"""Expert parallelism: each rank holds a part of a layer's routed experts, and tokens travel to them and back.

| dispatch | a token travels |
|---|---|
| all-to-all | once for each of its experts, in the compute dtype |
| two-hop | once to each node that has one of its experts, and there once to each rank that has one |
| two-hop-fp8 | the same way, to the experts in FP8 with a power-of-two scale for 128 values, and back in BF16 |
| deepep, deepep-fp8 | the same ways by DeepEP's kernels, where they are installed (parallel/deep_ep.py) |

With two hops (V3 §3.2.2) a token crosses to the rank of its own place in the other node, which passes it on. Outputs
are summed within each rank, then within the node, before they cross back.
In the backward pass gradients travel the same ways: those of the outputs like tokens, those of the tokens like outputs.
Experts apply a token's weights (model/moe.py), so that their outputs can be summed wherever they meet.

N tokens here, D hidden, K experts a token, M rows at the experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rorqual.errors import UserError
from rorqual.kernels.linear import row_multiple
from rorqual.kernels.moe_permute import permute, permute_weights, sort_by_expert, unpermute
from rorqual.kernels.typed_torch import Context, Function, not_compiled, once_differentiable
from rorqual.model import Transformer
from rorqual.model.moe import Dispatched, Experts
from rorqual.parallel.courier import Courier
from rorqual.parallel.deep_ep import DeepEP, DeepEPJourney
from rorqual.parallel.group import Group
from rorqual.parallel.journey import Hop, Journey
from rorqual.parallel.mesh import Mesh
from rorqual.shapes import Float, Int


class _Context(Context):
    journey: Journey


def _arrived(journey: Journey) -> list[Tensor]:
    assert journey.trip is not None
    return journey.trip.result()


# Each way is two functions, so that others can run between them, in both passes; the ticket from the first to the
# second is an empty tensor.


class _Depart(Function):
    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, weights: Tensor, chosen: Tensor, journey: Journey, travel: Callable[..., list[Tensor]]
    ) -> Tensor:
        ctx.journey = journey
        journey.trip = journey.courier.submit(travel, journey, x, weights, chosen)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, _ticket: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x, grad_weights = _arrived(ctx.journey)
        return grad_x, grad_weights, None, None, None


class _Arrive(Function):
    @staticmethod
    def forward(ctx: _Context, ticket: Tensor, journey: Journey) -> tuple[Tensor, Tensor]:
        ctx.journey = journey
        x, weights = _arrived(journey)
        return x, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_x: Tensor, grad_weights: Tensor) -> tuple[Tensor, None]:
        ctx.journey.trip = ctx.journey.courier.submit(ctx.journey.back, grad_x, grad_weights)
        return grad_x.new_empty(0), None


class _DepartBack(Function):
    @staticmethod
    def forward(ctx: _Context, y: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        journey.trip = journey.courier.submit(journey.back, y)
        return y.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, _ticket: Tensor) -> tuple[Tensor, None]:
        return _arrived(ctx.journey)[0], None


class _ArriveBack(Function):
    @staticmethod
    def forward(ctx: _Context, ticket: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return _arrived(journey)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        ctx.journey.trip = ctx.journey.courier.submit(ctx.journey.there, grad)
        return grad.new_empty(0), None


class ExpertParallel:
    """A TokenDispatcher for experts that are spread over the mesh's `experts` group."""

    def __init__(self, mesh: Mesh, experts: int, courier: Courier, deep_ep: DeepEP | None = None) -> None:
        """experts: routed ones of a layer. `courier`, and `deep_ep` where tokens travel by it, are of all layers."""
        self.mesh, self.group, self.courier, self.experts, self.deep_ep = mesh, mesh.experts, courier, experts, deep_ep
        self.own = experts // self.group.size  # here
        self.kind = mesh.section.dispatch

    @not_compiled  # shapes depend on the routing
    def __call__(
        self,
        experts: Experts,
        x: Float[Tensor, "N D"],
        weights: Float[Tensor, "N K"],
        chosen: Int[Tensor, "N K"],
        shared: Callable[[Tensor], Tensor] | None = None,
    ) -> Dispatched:
        """→ output, and the load of all experts by the tokens of this rank."""
        copies = chosen.shape[1] if self.kind == "all-to-all" else 1
        if self.deep_ep is None:
            journey = Journey(self.courier, self.kind == "two-hop-fp8", x.dtype, copies)
        else:
            journey = DeepEPJourney(self.courier, self.kind == "deepep-fp8", x.dtype, library=self.deep_ep)
        ticket = _Depart.apply(x, weights, chosen, journey, self._travel)
        beside = shared(x) if shared is not None else None
        rows, row_weights = _Arrive.apply(ticket, journey)
        if journey.chosen.is_cuda:
            journey.chosen.record_stream(torch.cuda.current_stream())  # it was made on the courier's
        y = self._compute(experts, rows, row_weights, journey.chosen)
        out = _ArriveBack.apply(_DepartBack.apply(y, journey), journey)
        slots = chosen.flatten()
        load = slots.new_zeros(self.experts).scatter_add_(0, slots, torch.ones_like(slots))
        return out if beside is None else out + beside, load

    def _compute(self, experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The sums, by row, of the outputs of the experts here."""
        here = chosen - self.own * self.group.place
        here = here.where((here >= 0) & (here < self.own), -1)
        multiple = row_multiple(x, experts.gate_up_proj, chosen.numel() // self.experts)
        permutation = sort_by_expert(here, self.own, multiple, partial=True)
        K = chosen.shape[1]
        y = experts(permute(x, permutation, K), permute_weights(weights, permutation), permutation.ends)
        return unpermute(y, permutation, K)

    def _travel(self, journey: Journey, x: Tensor, weights: Tensor, chosen: Tensor) -> list[Tensor]:
        """Plan the journey on the way → rows, and the weights of their experts."""
        if isinstance(journey, DeepEPJourney):
            return journey.depart(x, weights, chosen)
        if self.kind == "all-to-all":
            columns = [*journey.encode(x), weights.reshape(-1, 1), chosen.reshape(-1, 1).to(torch.int16)]
            columns = self._go(journey, self.group, chosen.reshape(-1, 1) // self.own, columns)
        else:
            rail, node = self.mesh.rail, self.mesh.node
            columns = [*journey.encode(x), weights, chosen.to(torch.int16)]
            columns = self._go(journey, rail, present(chosen // (self.own * node.size), rail.size), columns)
            place = columns[-1].to(torch.int64) // self.own - node.size * rail.place
            columns = self._go(journey, node, present(place, node.size), columns)
        *encoded, weights, chosen = columns
        journey.chosen = chosen.to(torch.int64)
        return [journey.decode(encoded), weights]

    def _go(self, journey: Journey, group: Group, to: Tensor, columns: list[Tensor]) -> list[Tensor]:
        if group.size == 1:
            return columns
        hop = Hop.plan(group, to)
        journey.hops.append(hop)
        return hop.there(columns)


def present(place: Int[Tensor, "N K"], places: int) -> Int[Tensor, "N places"]:
    """The places that occur in a row, each once in the column of its number; -1 elsewhere."""
    inside = (place >= 0) & (place < places)
    found = torch.zeros(len(place), places + 1, dtype=torch.bool, device=place.device)
    found.scatter_(1, place.where(inside, places), True)
    numbers = torch.arange(places, device=place.device)
    return numbers.where(found[:, :places], -1)


def first_expert(model: Transformer, mesh: Mesh) -> int:
    """The number of the first routed expert of every layer that this rank holds."""
    return mesh.experts.place * (model.config.n_routed_experts or 0) // mesh.experts.size


def shares_experts(model: Transformer) -> bool:
    """Whether other processes hold experts of this model, so that its forward passes are collectives."""
    return any(isinstance(layer.dispatcher, ExpertParallel) for layer in model.moe_layers())


def close_experts(model: Transformer) -> None:
    """Give back what DeepEP holds, on all ranks, while their process groups are there."""
    for layer in model.moe_layers():
        if isinstance(layer.dispatcher, ExpertParallel) and layer.dispatcher.deep_ep is not None:
            layer.dispatcher.deep_ep.close()  # all layers have the same


def spread_experts(model: Transformer, mesh: Mesh, courier: Courier) -> None:
    """Keep this rank's part of every layer's routed experts and dispatch tokens to all of them.

    Raises UserError where a layer's experts cannot be spread evenly.
    """
    group = mesh.experts
    if group.size == 1:
        return
    count = model.config.moe.n_routed_experts
    if count % group.size:
        raise UserError(
            f"parallel.experts = {group.size}: the model has {count} routed experts a layer, which cannot be spread "
            f"evenly; make it a divisor of {count}"
        )
    own = count // group.size
    deep_ep = DeepEP(mesh, count) if mesh.section.by_deep_ep else None
    for layer in model.moe_layers():
        for name, parameter in layer.experts.named_parameters():
            part = parameter.detach()[own * group.place : own * (group.place + 1)].clone()
            setattr(layer.experts, name, nn.Parameter(part, parameter.requires_grad))
        layer.dispatcher = ExpertParallel(mesh, count, courier, deep_ep)
