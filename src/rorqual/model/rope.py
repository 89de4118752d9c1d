"""Frequencies of rotary position embedding (RoFormer, 2104.09864), with the releases' context extension methods.

B batch, T tokens, F frequencies: half the rotary width.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rorqual.errors import UserError
from rorqual.kernels.rotary import Table
from rorqual.model.config import ModelConfig
from rorqual.shapes import Float32, Int


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature for a context extended `factor` times (V3 §4.3: 0.1·ln s + 1)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(config: ModelConfig) -> tuple[Float32[Tensor, " F"], float]:
    """Frequencies in radians a token, and the factor of cos and sin. Raises UserError for an unknown rope_type."""
    width = config.rope_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if kind == "yarn":
        return _yarn(frequencies, config.rope_theta, scaling)
    raise UserError(f"model.rope_scaling.rope_type = {kind!r}: must be default, linear, llama3 or yarn")


def softmax_scale(config: ModelConfig) -> float:
    """1/√d for the query width d, times YaRN's temperature squared where the release asks for it (V3 §4.3)."""
    if not config.is_mla:
        return config.gqa.head_dim**-0.5
    scale = config.mla.qk_head_dim**-0.5
    scaling = config.rope_scaling or {}
    if scaling.get("mscale_all_dim"):
        scale *= yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
    return scale


def _yarn(frequencies: Tensor, theta: float, s: dict[str, Any]) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, §3.2): slow frequencies are interpolated, fast ones kept, a ramp between them."""
    width, factor = 2 * len(frequencies), s["factor"]
    original = s["original_max_position_embeddings"]

    def index_of(rotations: float) -> float:  # the frequency that turns `rotations` times in the original context
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_of(s.get("beta_fast") or 32), index_of(s.get("beta_slow") or 1)
    if s.get("truncate") is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    steps = torch.arange(len(frequencies), dtype=torch.float32, device="cpu")
    interpolated = ((steps - low) / max(high - low, 1e-3)).clamp(0, 1)
    frequencies = frequencies / factor * interpolated + frequencies * (1 - interpolated)
    attention_factor = s.get("attention_factor")
    if attention_factor is None:
        mscale, all_dim = s.get("mscale"), s.get("mscale_all_dim")
        attention_factor = yarn_mscale(factor, mscale if mscale and all_dim else 1.0)
        if mscale and all_dim:
            attention_factor /= yarn_mscale(factor, all_dim)
    return frequencies, attention_factor


def _llama3(frequencies: Tensor, s: dict[str, Any]) -> Tensor:
    """Llama 3.1's scaling, also R1-Distill-Llama's: low frequencies divided, high ones kept, a blend between."""
    factor, low, high = s["factor"], s["low_freq_factor"], s["high_freq_factor"]
    turns = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies / factor * (1 - blend) + frequencies * blend


def rope_table(
    positions: Int[Tensor, "B T"], frequencies: Float32[Tensor, " F"], factor: float, dtype: torch.dtype
) -> Table:
    """cos and sin for each position."""
    angles = (positions[..., None].float() * frequencies).unsqueeze(2)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
