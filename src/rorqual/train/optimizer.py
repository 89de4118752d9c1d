"""AdamW and Muon over FP32 master weights, with clipping by the global gradient norm.

In float32 the masters are the model's own tensors. In bfloat16 the model's matrices are converted in place, FP32
masters are kept beside them, and gradients are accumulated in FP32 (V3 §3.3.2). Norms and the router are FP32 in both
cases, and so are gradients, whatever dtype the moments are kept in.

With several processes masters and moments are of the rows that this one owns (parallel/data.py), and with full sharding
so are the layers' weights (parallel/full_sharding.py).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rorqual.errors import UserError
from rorqual.kernels.accumulate import accumulate
from rorqual.kernels.adamw import BLOCK
from rorqual.model.parameter_kinds import is_converted, is_hidden_matrix
from rorqual.parallel.data import Sharding, Slice, global_norm, is_expert, square_sum
from rorqual.parallel.full_sharding import FullSharding
from rorqual.parallel.mesh import Mesh, single
from rorqual.plan.optimizer_state import StateBytes
from rorqual.recipe import OptimizerSection
from rorqual.train.adamw import AdamW
from rorqual.train.muon import Muon

# torch._foreach_*: no public names exist, and the type stubs do not export these.


@dataclass(frozen=True)
class StepResult:
    """Global gradient norm before clipping; `skipped`: it was not finite (or absent), and no weight was changed."""

    grad_norm: float
    skipped: bool


class Optimizer:
    """Owns master weights, gradients and moments of `model`. Call `accumulate` after each backward, then `step`."""

    def __init__(
        self, model: nn.Module, section: OptimizerSection, compute_dtype: torch.dtype, mesh: Mesh | None = None
    ) -> None:
        """`section.name` is 'adamw', or 'muon': Muon on hidden matrices, AdamW on embedding, head, router and norms.

        Convert the model's matrices (and the biases of its linears) to `compute_dtype` in place. Parameters without
        gradients have no state, and are no part of checkpoints.
        """
        self.section = section
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, p in model.named_parameters():
            if not p.requires_grad and is_converted(name, p):
                p.data = p.data.to(compute_dtype)
        # Such as the router's correction bias: not trained by gradient, but part of the checkpoint.
        self.buffers = {n: t for n, t in model.state_dict(keep_vars=True).items() if not isinstance(t, nn.Parameter)}
        hidden = {n for n, p in self.parameters.items() if section.name == "muon" and is_hidden_matrix(n, p)}
        self.mesh = mesh or single()
        self.sharding = Sharding(self.mesh, self.parameters, hidden)
        self.layers = FullSharding(model, self.sharding) if self.mesh.section.sharding == "full" else None
        gathered = self._gathered()
        self.masters: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}  # this rank's rows of the model's weights: views of them, or all that it keeps
        for name, p in self.parameters.items():
            whole = p.detach().float()
            stored = whole.to(compute_dtype) if is_converted(name, p) else whole
            p.data = stored
            rows = self.sharding.rows(name)
            own = whole[rows]
            self.own[name] = stored[rows].clone() if name in gathered else stored[rows]
            if own.numel():  # a view of the parameter, or a copy where that frees the other rows
                if stored is whole:
                    self.masters[name] = self.own[name]
                else:
                    self.masters[name] = own if len(own) == len(whole) else own.clone()
        self.muon = Muon(
            {n: w for n, w in self.masters.items() if n in hidden}, section.muon_lr, section.weight_decay,
            dtype=torch.float32 if section.moments == "float32" else torch.bfloat16,
        )  # fmt: skip
        elements = {n: math.prod(self.sharding.slice_of(n).shape) for n in self.masters}
        self.adamw = AdamW({n: w for n, w in self.masters.items() if n not in hidden}, section, elements)
        self.grads: dict[str, Tensor] = {}
        if self.layers:
            self.layers.begin(self.own, self._take)
        self.sums: dict[str, Tensor] = {}  # gradients of those layers, over all ranks, of this rank's rows
        self.copies: frozenset[str] = frozenset()  # parameters that another pipeline stage has too, which counts them
        self.before_change: Callable[[], None] | None = None  # called before the masters change

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add each parameter's `.grad` to its FP32 gradient and free it."""
        for name, p in self.parameters.items():
            if p.grad is not None:
                if name in self.grads:
                    accumulate(self.grads[name], p.grad)
                else:
                    self.grads[name] = p.grad.float()
                p.grad = None

    def _take(self, gradients: dict[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            self.sums[name] = self.sums[name] + gradient if name in self.sums else gradient

    def discard(self) -> None:
        """Drop the accumulated gradients."""
        self.grads.clear()
        self.sums.clear()
        for p in self.parameters.values():
            p.grad = None

    def own_norm(self) -> float:
        """Norm of the gradients accumulated here, without those of experts, to which others send tokens, and of layers
        that are fully sharded.
        """
        shared = self.mesh.experts.size > 1
        return math.sqrt(square_sum(g for name, g in self.grads.items() if not (shared and is_expert(name))))

    @torch.no_grad()
    def step(self, factor: float) -> StepResult:
        """Clip, update with learning rate · `factor`, copy masters to the model; skip where the norm is not finite."""
        if self.mesh.section.processes == 1 and not self.grads:
            return StepResult(0.0, skipped=True)
        found = self.sharding.reduce(self.grads) | self.sums
        grads = {name: found[name] for name in self.parameters if name in found}  # in the same order in every layout
        self.grads, self.sums = {}, {}
        norm = global_norm(self.mesh, grads, self.copies)
        if not norm < float("inf"):
            return StepResult(norm, skipped=True)
        if norm > self.section.clip:
            torch._foreach_mul_(list(grads.values()), self.section.clip / norm)  # pyright: ignore[reportPrivateImportUsage]
        self._about_to_change()
        self.adamw.step(grads, factor)
        self.muon.step(grads, factor)
        self._write_back()
        return StepResult(norm, skipped=False)

    def _about_to_change(self) -> None:
        if self.before_change is not None:
            self.before_change()

    def _write_back(self) -> None:
        converted = self._converted()
        if converted:
            own = [self.own[n] for n in converted]
            torch._foreach_copy_(own, [self.masters[n] for n in converted])  # pyright: ignore[reportPrivateImportUsage]
        self.spread()

    def spread(self) -> None:
        """Let every rank have the rows of the others, but of layers that are gathered when they are used."""
        gathered = self._gathered()
        self.sharding.spread({name: p for name, p in self.parameters.items() if name not in gathered})

    def held(self) -> dict[str, Tensor]:
        """The weights that this rank keeps, by parameter."""
        gathered = self._gathered()
        return {name: self.own[name] if name in gathered else p.data for name, p in self.parameters.items()}

    def _gathered(self) -> frozenset[str]:
        return self.layers.names if self.layers else frozenset()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Context in which the model holds all rows of all weights, as for an export."""
        if self.layers:
            self.layers.gather()
        try:
            yield
        finally:
            if self.layers:
                self.layers.free()

    def _converted(self) -> list[str]:
        """The parameters whose masters are kept beside them."""
        return [n for n, w in self.masters.items() if w.dtype is not self.parameters[n].dtype]

    def state_bytes(self) -> StateBytes:
        """Bytes of the masters beside the model's own tensors, of gradients between backward and step, and of moments.

        plan/optimizer_state.py predicts them.
        """
        return StateBytes(
            masters=sum(self.masters[n].nbytes for n in self._converted()),
            gradients=sum(t.numel() * torch.float32.itemsize for t in self.held().values()),
            moments=self.adamw.moment_bytes() + sum(t.nbytes for t in self.muon.momentum.values()),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint's tensors: masters, moments, step counts and the model's buffers (not copied)."""
        out = {f"weights.{n}": w for n, w in self.masters.items()}
        out |= {f"buffers.{n}": t for n, t in self.buffers.items()}
        out |= {f"adamw.{n}": t for n, t in self.adamw.tensors().items()}
        out |= {f"muon.momentum.{n}": t for n, t in self.muon.momentum.items()}
        return out

    def slices(self) -> dict[str, Slice]:
        """The rows of the whole model's tensors that `tensors` has, of those that are cut."""
        out: dict[str, Slice] = {}
        for name in self.masters:
            own = self.sharding.slice_of(name)
            out |= {f"{kind}{name}": own for kind in ("weights.", "adamw.first.", "adamw.second.", "muon.momentum.")}
            blocks = own.blocks(BLOCK)
            out |= {f"adamw.{kind}_scale.{name}": blocks for kind in ("first", "second")}
        return out

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned; other names are ignored.

        Raises UserError for one that is missing, or of another shape or dtype.
        """
        self._about_to_change()
        for name, mine in self.tensors().items():
            saved = tensors.get(name)
            if saved is None or saved.shape != mine.shape or saved.dtype is not mine.dtype:
                found = "is missing"
                if saved is not None:
                    found = f"has shape {list(saved.shape)}, not {list(mine.shape)}"
                    if saved.shape == mine.shape:
                        found = f"has dtype {saved.dtype}, not {mine.dtype}"
                raise UserError(
                    f"checkpoint tensor {name} {found}: it was saved by a run with another model or optimizer; "
                    "resume with the recipe the run was started with"
                )
            mine.copy_(saved)
        self._write_back()
