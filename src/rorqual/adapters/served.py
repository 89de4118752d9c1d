"""Several adapters of one model in memory, unmerged: the rows of a product each have the update of their own adapter.

A linear computes W·x for all rows at once and adds each adapter's s·B·(A·x) to its rows, so the base's weights are read
once, whatever the number of adapters (as in Punica, Chen et al. 2023, 2310.18547, and S-LoRA, Sheng et al. 2023). Where
which row is whose is not known inside the network (keys and values of latent attention, which are computed from the
cached context), a pass has one adapter.

Shapes: K in, N out, n rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rorqual.adapters.lora import check_shapes
from rorqual.adapters.low_rank import LowRank, linears
from rorqual.adapters.peft_files import Adapter
from rorqual.errors import UserError
from rorqual.kernels.fp8_weight import FP8Weight
from rorqual.model.attention import UpProjection
from rorqual.model.layers import Linear
from rorqual.model.transformer import Transformer
from rorqual.shapes import Float

Name = str | None  # of an adapter; None: the base


class ServedAdapters:
    """The adapters of a model, by name. Outside `applied` the model is the base."""

    def __init__(self, model: Transformer, adapters: Mapping[str, Adapter]) -> None:
        """Put the adapters into `model`, in place. Raises UserError for one that does not fit it."""
        self.names = frozenset(adapters)
        self.active: list[tuple[str, Tensor | None]] = []  # with its rows; None: all
        modules = dict(linears(model))
        weights = {f"{path}.weight": _shaped(module) for path, module in modules.items()}
        for name, adapter in adapters.items():
            try:
                check_shapes(adapter.updates, weights)
            except UserError as e:
                raise UserError(f"adapter {name}: {e}") from None
        updated = {path for adapter in adapters.values() for path in adapter.updates}
        self.by_rows = not any(isinstance(modules[path], UpProjection) for path in updated)
        device, dtype = model.head_weight.device, model.head_weight.dtype
        like = torch.empty(0, device=device, dtype=dtype)
        for path in updated:
            module = modules[path]
            own = {name: a.updates[path].to(like) for name, a in adapters.items() if path in a.updates}
            vars(module)["served"], vars(module)["adapters"] = own, self
            swapped = ServedUpProjection if isinstance(module, UpProjection) else ServedLinear
            object.__setattr__(module, "__class__", swapped)

    @contextmanager
    def applied(self, names: Sequence[Name]) -> Iterator[None]:
        """Context of a forward pass over as many rows (tokens) as there are `names`, each with that adapter.

        Different names need `by_rows`.
        """
        distinct = set(names)
        if len(distinct) == 1:
            self.active = [(name, None) for name in distinct if name is not None]
        else:
            assert self.by_rows, "a pass with several adapters cannot update up-projections"
            for name in sorted(name for name in distinct if name is not None):
                rows = torch.tensor([i for i, other in enumerate(names) if other == name])
                self.active.append((name, rows))
        try:
            yield
        finally:
            self.active = []


class ServedLinear(Linear):
    """W·x + b, and on the rows of an adapter s·B·(A·x)."""

    served: dict[str, LowRank]
    adapters: ServedAdapters

    def forward(self, input: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        out = super().forward(input)
        for name, rows in self.adapters.active:
            update = self.served.get(name)
            if update is None:
                continue
            if rows is None:
                out = out + update(input)
            else:
                at = rows.to(input.device)
                out = out.index_add(-2, at, update(input.index_select(-2, at)))
        return out


class ServedUpProjection(ServedLinear, UpProjection):
    """In its absorbed form too; a pass has one adapter."""

    def matrix(self, dtype: torch.dtype) -> Float[Tensor, "N K"]:
        found = super().matrix(dtype)
        for name, _ in self.adapters.active:
            if name in self.served:
                found = self.served[name].added_to(found)
        return found


def _shaped(module: Linear) -> Tensor:
    """The shape of a linear's weight, as a tensor without memory; FP8 weights are stacks of one."""
    weight: object = module.weight
    shape = weight.codes.shape[-2:] if isinstance(weight, FP8Weight) else module.weight.shape
    return torch.empty(*shape, device="meta")
