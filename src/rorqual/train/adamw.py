"""AdamW over FP32 master weights, with moments in FP32, BF16 or 8 bits."""

import hashlib

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from rorqual.kernels.adamw import Coefficients, adamw_8bit, adamw_bfloat16, moment_dtype, scales
from rorqual.recipe import OptimizerSection


class AdamW:
    """AdamW with weight decay on matrices only. FP32 moments: torch's fused kernel, once per group."""

    def __init__(
        self, masters: dict[str, Tensor], section: OptimizerSection, elements: dict[str, int] | None = None
    ) -> None:
        """elements: of the whole tensors, where masters are parts of them."""
        self.masters, self.section = masters, section
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        self.steps: dict[str, Tensor] = {}
        self.first_scale: dict[str, Tensor] = {}  # of the tensors whose moments are in 8 bits
        self.second_scale: dict[str, Tensor] = {}
        for name, w in masters.items():
            stored = moment_dtype(section.moments, elements[name] if elements else w.numel())
            self.first[name] = torch.zeros_like(w, dtype=stored)
            self.second[name] = torch.zeros_like(w, dtype=stored)
            # torch's kernel wants the count beside the weights; the others are called with it.
            self.steps[name] = torch.zeros((), device=w.device if stored is torch.float32 else "cpu")
            if stored is torch.uint8:
                self.first_scale[name] = w.new_zeros(scales(w.numel()))
                self.second_scale[name] = w.new_zeros(scales(w.numel()))
        # Of the rounding by chance: drawn once, from the run's generator, and kept with the checkpoint.
        self.seed = torch.randint(1 << 62, ()) if section.stochastic_rounding else None

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], factor: float) -> None:
        """Update each tensor that has a gradient, with learning rate lr · factor."""
        section = self.section
        lr = section.lr * factor
        for decays in (True, False):
            weight_decay = section.weight_decay if decays else 0.0
            names = [n for n, w in self.masters.items() if n in grads and (w.ndim >= 2) == decays]
            fused = [n for n in names if self.first[n].dtype is torch.float32]
            if fused:
                adamw(
                    [self.masters[n] for n in fused],
                    [grads[n] for n in fused],
                    [self.first[n] for n in fused],
                    [self.second[n] for n in fused],
                    [],
                    [self.steps[n] for n in fused],
                    fused=True,
                    amsgrad=False,
                    beta1=section.betas[0],
                    beta2=section.betas[1],
                    lr=lr,
                    weight_decay=weight_decay,
                    eps=section.eps,
                    maximize=False,
                )
            for name in names:
                if self.first[name].dtype is not torch.float32:
                    self._step_low_bit(name, grads[name], lr, weight_decay)

    def _step_low_bit(self, name: str, grad: Tensor, lr: float, weight_decay: float) -> None:
        self.steps[name] += 1
        steps = int(self.steps[name])
        step = Coefficients.of(lr, self.section.betas, weight_decay, self.section.eps, steps)
        weight, first, second = self.masters[name], self.first[name], self.second[name]
        if first.dtype is torch.bfloat16:
            adamw_bfloat16(weight, grad, first, second, step, self._key(name, steps))
        else:
            adamw_8bit(weight, grad, first, second, self.first_scale[name], self.second_scale[name], step)

    def _key(self, name: str, steps: int) -> int | None:
        """Of the random numbers of a tensor's step."""
        if self.seed is None:
            return None
        text = f"{int(self.seed)} {steps} {name}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")

    def moment_bytes(self) -> int:
        """Of the moments with their scales."""
        kept = (self.first, self.second, self.first_scale, self.second_scale)
        return sum(t.nbytes for tensors in kept for t in tensors.values())

    def tensors(self) -> dict[str, Tensor]:
        """Moments, scales, step counts and the seed, each in the dtype it is kept in (not copied)."""
        kept = {
            "first": self.first,
            "second": self.second,
            "steps": self.steps,
            "first_scale": self.first_scale,
            "second_scale": self.second_scale,
        }
        out = {f"{kind}.{name}": t for kind, tensors in kept.items() for name, t in tensors.items()}
        return out if self.seed is None else out | {"seed": self.seed}
