"""AdamW and Muon over FP32 master weights, with clipping by the global gradient norm.

In float32 the masters are the model's own tensors. In bfloat16 the model's matrices are converted in place, FP32
masters are kept beside them, and gradients are accumulated in FP32 (V3 §3.3.2). Norms and the router are FP32 in both
cases.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from rorqual.errors import UserError
from rorqual.kernels.accumulate import accumulate
from rorqual.recipe import OptimizerSection
from rorqual.train.muon import Muon

# torch._foreach_*: no public names exist, and the type stubs do not export these.


@dataclass(frozen=True)
class StepResult:
    """Global gradient norm before clipping; `skipped`: it was not finite (or absent), and no weight was changed."""

    grad_norm: float
    skipped: bool


def is_converted(name: str, parameter: Tensor) -> bool:
    """Whether it is stored in the compute dtype: embeddings, linears with biases, experts; not router and norms."""
    return (parameter.ndim >= 2 and not name.endswith("mlp.gate.weight")) or name.endswith(".bias")


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates it: matrices other than embedding, head and router."""
    outside = "embed_tokens" in name or name.startswith("lm_head") or name.endswith("mlp.gate.weight")
    return parameter.ndim >= 2 and not outside


class AdamW:
    """AdamW with weight decay on matrices only; torch's fused kernel, once per group."""

    def __init__(self, masters: dict[str, Tensor], section: OptimizerSection) -> None:
        self.masters, self.section = masters, section
        self.first = {name: torch.zeros_like(w) for name, w in masters.items()}
        self.second = {name: torch.zeros_like(w) for name, w in masters.items()}
        self.steps = {name: torch.zeros((), device=w.device) for name, w in masters.items()}

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], factor: float) -> None:
        section = self.section
        for decays in (True, False):
            names = [n for n, w in self.masters.items() if n in grads and (w.ndim >= 2) == decays]
            if names:
                adamw(
                    [self.masters[n] for n in names],
                    [grads[n] for n in names],
                    [self.first[n] for n in names],
                    [self.second[n] for n in names],
                    [],
                    [self.steps[n] for n in names],
                    fused=True,
                    amsgrad=False,
                    beta1=section.betas[0],
                    beta2=section.betas[1],
                    lr=section.lr * factor,
                    weight_decay=section.weight_decay if decays else 0.0,
                    eps=section.eps,
                    maximize=False,
                )


class Optimizer:
    """Owns master weights, gradients and moments of `model`. Call `accumulate` after each backward, then `step`."""

    def __init__(self, model: nn.Module, section: OptimizerSection, compute_dtype: torch.dtype) -> None:
        """`section.name` is 'adamw', or 'muon': Muon on hidden matrices, AdamW on embedding, head, router and norms.

        Convert the model's matrices (and the biases of its linears) to `compute_dtype` in place.
        """
        self.section = section
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Such as the router's correction bias: not trained by gradient, but part of the checkpoint.
        self.buffers = {n: t for n, t in model.state_dict(keep_vars=True).items() if not isinstance(t, nn.Parameter)}
        self.masters: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            self.masters[name] = p.detach().float()
            p.data = self.masters[name].to(compute_dtype) if is_converted(name, p) else self.masters[name]
        hidden = {n for n, w in self.masters.items() if section.name == "muon" and is_hidden_matrix(n, w)}
        self.muon = Muon({n: w for n, w in self.masters.items() if n in hidden}, section.muon_lr, section.weight_decay)
        self.adamw = AdamW({n: w for n, w in self.masters.items() if n not in hidden}, section)
        self.grads: dict[str, Tensor] = {}

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

    def discard(self) -> None:
        """Drop the accumulated gradients."""
        self.grads.clear()
        for p in self.parameters.values():
            p.grad = None

    @torch.no_grad()
    def step(self, factor: float) -> StepResult:
        """Clip, update with learning rate · `factor`, copy masters to the model; skip where the norm is not finite."""
        gradients = list(self.grads.values())
        if not gradients:
            return StepResult(0.0, skipped=True)
        norm = float(torch.stack(torch._foreach_norm(gradients)).norm())  # pyright: ignore[reportPrivateImportUsage]
        if not norm < float("inf"):
            self.discard()
            return StepResult(norm, skipped=True)
        if norm > self.section.clip:
            torch._foreach_mul_(gradients, self.section.clip / norm)  # pyright: ignore[reportPrivateImportUsage]
        self.adamw.step(self.grads, factor)
        self.muon.step(self.grads, factor)
        self.grads.clear()
        self._write_back()
        return StepResult(norm, skipped=False)

    def _write_back(self) -> None:
        converted = [n for n, p in self.parameters.items() if p.data_ptr() != self.masters[n].data_ptr()]
        if converted:
            torch._foreach_copy_([self.parameters[n].data for n in converted], [self.masters[n] for n in converted])  # pyright: ignore[reportPrivateImportUsage]

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint's tensors: masters, moments, step counts and the model's buffers (not copied)."""
        out = {f"weights.{n}": w for n, w in self.masters.items()}
        out |= {f"buffers.{n}": t for n, t in self.buffers.items()}
        out |= {f"adamw.first.{n}": t for n, t in self.adamw.first.items()}
        out |= {f"adamw.second.{n}": t for n, t in self.adamw.second.items()}
        out |= {f"adamw.steps.{n}": t for n, t in self.adamw.steps.items()}
        out |= {f"muon.momentum.{n}": t for n, t in self.muon.momentum.items()}
        return out

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned; other names are ignored. Raises UserError for one missing or misshapen."""
        for name, mine in self.tensors().items():
            saved = tensors.get(name)
            if saved is None or saved.shape != mine.shape:
                found = "is missing" if saved is None else f"has shape {list(saved.shape)}, not {list(mine.shape)}"
                raise UserError(
                    f"checkpoint tensor {name} {found}: it was saved by a run with another model or optimizer; "
                    "resume with the recipe the run was started with"
                )
            mine.copy_(saved)
        self._write_back()
