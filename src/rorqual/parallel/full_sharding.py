"""Full sharding: a rank keeps its rows of the layers' weights alone, and gathers a layer while it computes (ZeRO-3).

ZeRO-1 (parallel/data.py) keeps all weights and their FP32 gradients everywhere. Here a layer's weights are gathered
before its forward pass and again before its backward pass, and freed after each; its gradients go to the owners of the
rows after the backward pass of each micro-batch. Memory falls to that of the own rows and one layer; weights travel
twice and gradients once for each micro-batch, where ZeRO-1 sends each once a step. Embedding, last norm and head, which
both ends of every pass use, stay whole, and so does what no other rank has.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from rorqual.kernels.typed_torch import Context, Function, once_differentiable
from rorqual.model.transformer import Block
from rorqual.parallel.data import Sharding


class Layer:
    """One layer's parameters of which other ranks own rows too."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        own: Mapping[str, Tensor],
        sharding: Sharding,
        take: Callable[[dict[str, Tensor]], None],
    ) -> None:
        """own: this rank's rows. take: called with the sums of their gradients over ranks."""
        self.parameters, self.own, self.sharding, self.take = parameters, own, sharding, take
        self.sizes = {name: p.untyped_storage().nbytes() for name, p in parameters.items()}
        self.free()

    @torch.no_grad()
    def gather(self) -> None:
        for name, p in self.parameters.items():
            p.untyped_storage().resize_(self.sizes[name])
            p.data[self.sharding.rows(name)] = self.own[name]
        self.sharding.spread(self.parameters)

    def free(self) -> None:
        """Tensors that autograd keeps share these storages, which the next `gather` fills again."""
        for p in self.parameters.values():
            p.untyped_storage().resize_(0)

    def forward(self, forward: Callable[..., Tensor], x: Tensor, *inputs: object) -> Tensor:
        """As `forward(x, *inputs)`. The backward pass begins with the output's gradient and ends with the input's."""
        self.gather()
        out = forward(_OnGradient.apply(x, self.finish_backward), *inputs)
        self.free()
        return _OnGradient.apply(out, self.gather)

    def finish_backward(self) -> None:
        gradients = {name: p.grad.float() for name, p in self.parameters.items() if p.grad is not None}
        for p in self.parameters.values():
            p.grad = None
        self.take(self.sharding.reduce(gradients))
        self.free()


class FullSharding:
    """The layers of a model whose weights are gathered on use."""

    def __init__(self, model: nn.Module, sharding: Sharding) -> None:
        self.sharding = sharding
        self.modules: list[tuple[nn.Module, dict[str, nn.Parameter]]] = []
        for prefix, module in model.named_modules():
            if isinstance(module, Block):
                named = {f"{prefix}.{name}": p for name, p in module.named_parameters()}
                shared = {n: p for n, p in named.items() if n in sharding.shapes and sharding.group(n).size > 1}
                self.modules += [(module, shared)] if shared else []
        self.names = frozenset(chain.from_iterable(parameters for _, parameters in self.modules))
        self.layers: list[Layer] = []

    def begin(self, own: Mapping[str, Tensor], take: Callable[[dict[str, Tensor]], None]) -> None:
        """Free the rows of other ranks, in place. own: this rank's, in tensors of their own; take: see Layer."""
        for module, parameters in self.modules:
            layer = Layer(parameters, own, self.sharding, take)
            vars(module)["forward"] = partial(layer.forward, module.forward)
            self.layers.append(layer)

    def gather(self) -> None:
        """All layers, as for an export."""
        for layer in self.layers:
            layer.gather()

    def free(self) -> None:
        for layer in self.layers:
            layer.free()


class _CallContext(Context):
    call: Callable[[], None]


class _OnGradient(Function):
    """The identity; `call` is called when the gradient is there."""

    @staticmethod
    def forward(ctx: _CallContext, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: _CallContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.call()
        return grad, None
