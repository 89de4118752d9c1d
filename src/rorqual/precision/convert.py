"""Swap the linears of a built model for those of a recipe's precision, and say what was swapped and what stays."""

from dataclasses import dataclass, field

from torch import nn

from rorqual.checkpoint.release_tensors import meta_model
from rorqual.kernels.scaled_linear import LinearFormats
from rorqual.model import ModelConfig, Transformer
from rorqual.model.attention import UpProjection
from rorqual.model.layers import Linear, RMSNorm, SwiGLU
from rorqual.model.moe import Experts, Router
from rorqual.precision.formats import PRECISIONS, Precision
from rorqual.precision.fp8 import FP8Experts, FP8Linear, FP8SwiGLU, FP8UpProjection

# Why V3 §3.3.1 keeps them in the original precision.
KEPT = {
    "embedding": "a table that is looked up: no product to speed up",
    "head": "its errors reach the loss directly",
    "router": "a small error changes which experts a token goes to",
    "norms": "few numbers, and sensitive",
    "attention core": "products of activations, whose softmax is sensitive",
}


@dataclass
class Conversion:
    """What `convert` did: parameters by kind."""

    name: str
    swapped: dict[str, int] = field(default_factory=dict[str, int])
    kept: dict[str, int] = field(default_factory=dict[str, int])

    def lines(self) -> list[str]:
        """For people: what is rounded, and why the rest is not."""
        total = sum(self.swapped.values()) + sum(self.kept.values())
        share = sum(self.swapped.values()) / max(total, 1)
        rounded = ", ".join(f"{kind} {count / 1e6:.2f} M" for kind, count in self.swapped.items())
        lines = [f"precision {self.name}: {PRECISIONS[self.name].what}", f"  {share:.1%} of parameters: {rounded}"]
        for kind, why in KEPT.items():
            count = f" {self.kept[kind] / 1e6:.2f} M" if kind in self.kept else ""
            lines.append(f"  not {kind}{count}: {why}")
        return lines


def convert(model: Transformer, name: str) -> Conversion:
    """Give the linears of `model` the precision `name` (a key of PRECISIONS), in place.

    Parameters stay the same objects with the same names.
    """
    precision, done = PRECISIONS[name], Conversion(name)
    for path, module in model.named_modules():
        kind, formats = _kind(path, module, precision)
        if formats is not None:
            # The class alone: parameters, hooks and whoever holds the module stay.
            vars(module)["formats"] = formats
            object.__setattr__(module, "__class__", next(new for old, new in SWAPS.items() if isinstance(module, old)))
        if kind:
            counts = done.swapped if formats is not None else done.kept
            counts[kind] = counts.get(kind, 0) + sum(p.numel() for p in module.parameters())
    return done


# The first that fits counts.
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    Experts: FP8Experts,
    SwiGLU: FP8SwiGLU,
    UpProjection: FP8UpProjection,
    Linear: FP8Linear,
}


def described(config: ModelConfig, name: str) -> list[str]:
    """What `convert` would say of a model of these sizes."""
    return convert(meta_model(config), name).lines()


def _kind(path: str, module: nn.Module, precision: Precision) -> tuple[str, LinearFormats | None]:
    """What a module is called in the report ("": it has no parameters of its own), and its formats; None: it stays."""
    match module:
        case Experts():
            return "routed experts", precision.experts
        case SwiGLU() if module.down_proj.bias is None:  # with biases only its linears are swapped
            return "", precision.linear  # its linears are counted
        case Linear() if path in ("lm_head", "score"):
            return "head", None
        case Linear() if ".self_attn." in path:
            return "attention", precision.after_attention if path.endswith(".o_proj") else precision.linear
        case Linear() if path.endswith(".eh_proj"):
            return "multi-token module", precision.linear
        case Linear():
            return "shared experts" if ".shared_experts." in path else "feed-forward", precision.linear
        case _:
            kinds = {nn.Embedding: "embedding", Router: "router", RMSNorm: "norms"}
            return next((name for kind, name in kinds.items() if isinstance(module, kind)), ""), None
