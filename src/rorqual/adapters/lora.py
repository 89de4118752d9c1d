"""LoRA: the base is frozen, and low-rank updates of its linears are trained (Hu et al. 2021, 2106.09685).

`add_lora` puts them into a built model, where they are parameters (`….q_proj.lora_A`, `….q_proj.lora_B`) beside the
weight; optimizer, checkpoints and engine then see a model with fewer trained parameters. Updates of all linears, α = 32
and ten times the learning rate are what matched full fine-tuning in "LoRA Without Regret" (Schulman et al. 2025).
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.adapters.low_rank import LowRank, linears
from rorqual.checkpoint.release_tensors import release_tensors
from rorqual.errors import UserError
from rorqual.model.attention import UpProjection
from rorqual.model.layers import Linear
from rorqual.model.transformer import Transformer
from rorqual.sections import LoRASection
from rorqual.shapes import Float


class LoRALinear(Linear):
    """W·x + b + s·B·(A·x), of which A and B are trained."""

    lora_A: nn.Parameter  # [r, K]
    lora_B: nn.Parameter  # [N, r]
    lora_scale: float

    @property
    def update(self) -> LowRank:
        return LowRank(self.lora_A, self.lora_B, self.lora_scale)

    def forward(self, input: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        return super().forward(input) + self.update(input)


class LoRAUpProjection(LoRALinear, UpProjection):
    """In its absorbed form too."""

    def matrix(self, dtype: torch.dtype) -> Float[Tensor, "N K"]:
        return self.update.added_to(super().matrix(dtype))


def add_lora(model: Transformer, section: LoRASection, seed: int) -> None:
    """Freeze `model` and give the section's targets updates that start at 0: B = 0, A uniform as in a linear of its
    shape (He et al. 2015), determined by `seed`.

    Raises UserError for a target that the model does not have.
    """
    targets = dict(_targets(model, section))
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in targets.values():
        N, K = module.weight.shape
        new, options = section.rank, {"device": module.weight.device, "dtype": module.weight.dtype}
        A, B = torch.empty(new, K, **options), torch.zeros(N, new, **options)
        if not A.is_meta:
            A.copy_((2 * torch.rand(new, K, generator=generator) - 1) / math.sqrt(K))
        module.lora_A, module.lora_B = nn.Parameter(A), nn.Parameter(B)
        vars(module)["lora_scale"] = section.alpha / section.rank
        # The class alone: parameters, hooks and whoever holds the module stay.
        swapped = LoRAUpProjection if isinstance(module, UpProjection) else LoRALinear
        object.__setattr__(module, "__class__", swapped)


def check_targets(model: Transformer, section: LoRASection) -> None:
    """Raises UserError as `add_lora`; `model` may be on the meta device."""
    dict(_targets(model, section))


def updates(model: Transformer) -> dict[str, LowRank]:
    """The updates of a model that `add_lora` changed, by the path of their linear; detached, not copied."""
    return {
        path: LowRank(module.lora_A.detach(), module.lora_B.detach(), module.lora_scale)
        for path, module in linears(model)
        if isinstance(module, LoRALinear)
    }


def lora_parameters(model: Transformer) -> dict[str, Tensor]:
    """Those that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("lora_A", "lora_B")}


@torch.no_grad()
def merge_lora(model: Transformer) -> None:
    """Add the updates to the weights, in place; the linears are plain ones again, all parameters can be trained."""
    found = updates(model)
    for path in found:
        module = model.get_submodule(path)
        del module.lora_A, module.lora_B, module.lora_scale
        object.__setattr__(module, "__class__", UpProjection if isinstance(module, UpProjection) else Linear)
    merge(model, found)
    model.requires_grad_(True)


@torch.no_grad()
def merge(model: Transformer, found: Mapping[str, LowRank]) -> None:
    """Add updates, by the path of their linear in a release, to a model's weights in place. Routed experts may be among
    them. Raises UserError for a path or a shape that the model does not have.
    """
    tensors = release_tensors(model)
    check_shapes(found, {name: t for name, t in tensors.items() if t.ndim == 2})
    for path, update in found.items():
        weight = tensors[f"{path}.weight"]
        weight.copy_(update.to(weight).added_to(weight))


def check_shapes(found: Mapping[str, LowRank], weights: Mapping[str, Tensor]) -> None:
    """Raises UserError for an update without a weight, by release name, that it fits."""
    for path, update in found.items():
        weight = weights.get(f"{path}.weight")
        if weight is None:
            raise UserError(
                f"the adapter updates {path}, which the model does not have; give the model it was made for"
            )
        if weight.shape != (len(update.B), update.A.shape[1]):
            raise UserError(
                f"the adapter updates {path} as {len(update.B)} × {update.A.shape[1]}, but the model's is "
                f"{' × '.join(map(str, weight.shape))}; give the model it was made for"
            )


class AdapterReference:
    """π_ref of a policy with LoRA: the same base, with the updates as they were when they were last copied.

    At the start they are 0, so it is the base itself. Called as the model.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.kept = {name: p.detach().clone() for name, p in lora_parameters(model).items()}

    def __call__(self, *inputs: Any, **more: Any) -> Tensor:
        return torch.func.functional_call(self.model, self.kept, inputs, more)

    @property
    def head_weight(self) -> Tensor:
        return self.model.head_weight

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.kept)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the updates among these tensors."""
        for name, tensor in self.kept.items():
            tensor.copy_(state[name])


def _targets(model: Transformer, section: LoRASection) -> Iterator[tuple[str, Linear]]:
    """The linears of the section's targets: names such as q_proj, or "all"."""
    found = list(linears(model))
    known = {path.rpartition(".")[2] for path, _ in found}
    wanted = known if section.targets == "all" else set(section.targets)
    for name in sorted(wanted - known):
        what = "routed experts are stacked and take no adapter" if "expert" in name else "the model has no such linear"
        raise UserError(f'lora.targets: {name!r}: {what}; choose among {", ".join(sorted(known))}, or "all"')
    return ((path, module) for path, module in found if path.rpartition(".")[2] in wanted)
