"""DeepSeek's FP8 releases: E4M3 weights with one scale per block (V3 §3.3.2), beside each its scales.

`X.weight` [R, C] has scales `X.weight_scale_inv` [⌈R/r⌉, ⌈C/c⌉] for blocks of r × c, by which its numbers are
multiplied. config.json's `quantization_config` gives the blocks; with `scale_fmt` "ue8m0" (V3.1) scales are powers of
two, stored in FP32 all the same.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from rorqual.errors import UserError
from rorqual.kernels.block_scaled import quantize
from rorqual.kernels.number_formats import FP8_BLOCK, NumberFormat, with_powers_of_two
from rorqual.strict_json import Json

SCALE_SUFFIX = "_scale_inv"  # the release's name for the scale by which a block is multiplied
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)

ScaleFormat = Literal["fp32", "ue8m0"]
BLOCK_FORMATS: dict[ScaleFormat, NumberFormat] = {"fp32": FP8_BLOCK, "ue8m0": with_powers_of_two(FP8_BLOCK)}


def block_format(raw: Mapping[str, Json], source: str) -> NumberFormat:
    """The number format of FP8 weights, from a config.json's `quantization_config`; blocks of 128 × 128 by default.

    Raises UserError for quantised releases that are not block-scaled FP8.
    """
    quantization = raw.get("quantization_config")
    if not isinstance(quantization, dict | None):
        raise UserError(f"{source}: quantization_config must be an object; restore the file")
    quantization = quantization or {}
    if (method := quantization.get("quant_method", "fp8")) != "fp8":
        raise UserError(f"{source}: quant_method {method!r} is not supported; get the unquantised release, or FP8")
    if (element := quantization.get("fmt", "e4m3")) != "e4m3":
        raise UserError(f'{source}: fmt = {element!r} is not supported; it must be "e4m3"')
    if (scales := quantization.get("scale_fmt")) not in (None, "ue8m0"):
        raise UserError(f'{source}: scale_fmt = {scales!r} is not supported; it must be "ue8m0", or left out')
    match quantization.get("weight_block_size", [128, 128]):
        case [int(rows), int(columns)] if rows > 0 and columns > 0 and bool not in (type(rows), type(columns)):
            return replace(BLOCK_FORMATS["ue8m0" if scales else "fp32"], tile=(rows, columns))
        case block:
            raise UserError(f"{source}: weight_block_size = {block!r} must be two whole numbers, such as [128, 128]")


def is_rounded(name: str) -> bool:
    """Whether a release stores this tensor in FP8: the weights of linears, experts' too, by name.

    Not those of embedding, head, routers and norms, nor the multi-token module's `eh_proj`, which vLLM reads unrounded.
    """
    return re.search(r"\.(?!eh_)\w+_proj(_with_mqa)?\.weight$", name) is not None


def round_to_blocks(tensors: Mapping[str, Tensor], scales: ScaleFormat) -> dict[str, Tensor]:
    """Release name → tensor, with the weights of linears in FP8 and their scales after each; others as they are.

    Blocks are 128 × 128, rounded to nearest, with scales from the largest magnitude.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_rounded(name):
            out[name], out[name + SCALE_SUFFIX] = round_weight(tensor, BLOCK_FORMATS[scales])
        else:
            out[name] = tensor
    return out


def round_weight(weight: Tensor, format: NumberFormat) -> tuple[Tensor, Tensor]:
    """weight [R, C] → E4M3 [R, C] and FP32 scales."""
    rounded = quantize(weight, format)
    codes, scales = rounded.kept
    return codes.view(torch.float8_e4m3fn), scales


def quantization_config(tensors: Mapping[str, Tensor], format: NumberFormat) -> dict[str, Any]:
    """config.json's `quantization_config` for FP8 tensors, by release name, as DeepSeek's releases, transformers and
    vLLM have it.
    """
    found: dict[str, Any] = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    if format.scale == "power of two":
        found["scale_fmt"] = "ue8m0"
    found["weight_block_size"] = list(format.tile)
    if plain := [name for name in tensors if is_rounded(name) and name + SCALE_SUFFIX not in tensors]:
        found["modules_to_not_convert"] = ["lm_head", *(name.removesuffix(".weight") for name in plain)]
    return found
