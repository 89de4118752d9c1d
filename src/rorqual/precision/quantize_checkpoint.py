"""`rorqual quantize`: writes a Hugging Face directory with quantised weights, and reports what that costs.

int4 and int8 are written in compressed-tensors format (packed_checkpoint.py), fp8 as in DeepSeek's releases
(checkpoint/fp8_blocks.py); transformers and vLLM read both. Embedding, head, norms and routers are stored unquantised.
Layers are quantised one after the other: what calibrates a layer has passed through the quantised ones before it.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rorqual.checkpoint.fp8_blocks import SCALE_SUFFIX, quantization_config, round_weight
from rorqual.checkpoint.huggingface import load_model, stored_dtype
from rorqual.checkpoint.model_writer import copy_companions, new_directory, write_json, write_weights
from rorqual.checkpoint.release_tensors import release_tensors
from rorqual.data.tokenizer import load_tokenizer
from rorqual.errors import UserError
from rorqual.kernels.block_scaled import decode
from rorqual.kernels.linear import linear
from rorqual.kernels.number_formats import FP8_BLOCK
from rorqual.kernels.swiglu import swiglu_joined
from rorqual.model import ModelConfig, Transformer
from rorqual.model.attention import UpProjection
from rorqual.model.layers import Linear
from rorqual.model.model_directory import check_destination, model_directory, read_json
from rorqual.model.moe import Experts
from rorqual.model.transformer import Block, Layer
from rorqual.precision import awq
from rorqual.precision.calibrate import HiddenStates, LinearInputs, recording
from rorqual.precision.calibration_text import TextSettings, Windows, read_windows
from rorqual.precision.gptq import gptq
from rorqual.precision.integer_rounding import dequantized, output_error, round_nearest
from rorqual.precision.packed_checkpoint import description, is_quantized, pack_tensors
from rorqual.precision.quantization_report import LayerError, Perplexity, QuantizationReport, relative, weight_bytes
from rorqual.precision.quantize import Bits
from rorqual.precision.smoothquant import smooth
from rorqual.process_tuning import release_memory

Format = Literal["int4", "int8", "fp8"]
Method = Literal["rtn", "gptq", "awq"]
MIN_ROWS = 128  # fewer calibration rows say too little of a linear's inputs: it is rounded to nearest


class Rounded(NamedTuple):
    stored: dict[str, Tensor]  # the tensors that stand for a weight, by the ends of their names
    value: Tensor  # [N, K] that they stand for, FP32


@torch.no_grad()
def quantize_checkpoint(
    source: Path, dest: Path, format: Format, method: Method = "rtn", text: TextSettings | None = None
) -> QuantizationReport:
    """Write `source` with its linears quantised to `dest`, which appears whole or not at all. Raises UserError."""
    source = model_directory(source)
    check_destination(dest, source)
    _check(source, format, method)
    windows = _windows(source, method, text or TextSettings())
    model = load_model(source, stored_dtype(source))
    if format != "fp8" and method != "awq":  # which chooses these scales itself
        smooth(model)
    found = QuantizationReport(format, method, windows.text)
    found.calibration_tokens = 0 if windows.calibration is None else windows.calibration.numel()
    tensors = dict(release_tensors(model))
    for name, rounded in _Quantizer(model, format, method, windows, found).run():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{end}": t for end, t in rounded.items()}
    raw = read_json(source / "config.json") | {
        "quantization_config": quantization_config(tensors, FP8_BLOCK) if format == "fp8" else description(format)
    }
    with new_directory(dest) as temporary:
        write_json(temporary / "config.json", raw)
        copy_companions(source, temporary)
        write_weights(tensors, temporary)
        found.bytes_before, found.bytes_after = weight_bytes(source), weight_bytes(temporary)
    return found


def _check(source: Path, format: Format, method: Method) -> None:
    if format == "fp8" and method != "rtn":
        raise UserError(f"--method {method} is for integers; fp8 is rounded to nearest: leave --method out")
    theirs: Any = read_json(source / "config.json").get("quantization_config") or {}
    is_fp8 = isinstance(theirs, dict) and theirs.get("quant_method") == "fp8"
    if is_quantized(source) or (format == "fp8" and is_fp8):
        raise UserError(f"{source} is quantised already; give the directory that it was made from")


def _windows(source: Path, method: Method, text: TextSettings) -> Windows:
    length = text.window_length(ModelConfig.load(source).max_position_embeddings)
    if method == "rtn" and text.calibration is None and text.heldout is None:
        return Windows()
    windows = read_windows(text, load_tokenizer(source), length, calibrate=method != "rtn")
    if method != "rtn" and windows.calibration is not None and windows.calibration.numel() < MIN_ROWS:
        raise UserError(
            f"--method {method} needs {MIN_ROWS} tokens to calibrate on, but {windows.text} gives "
            f"{windows.calibration.numel()}; give a longer text, or raise --samples or --sequence-length"
        )
    return windows


class _Quantizer:
    """Goes through a model's blocks; what is not quantised changes in place where a method folds scales into it."""

    def __init__(
        self, model: Transformer, format: Format, method: Method, windows: Windows, report: QuantizationReport
    ) -> None:
        self.model, self.windows, self.report = model, windows, report
        self.format: Format = format
        self.method: Method = method
        self.calibration = None if windows.calibration is None else HiddenStates(model, windows.calibration)

    def run(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Names of linears, and the tensors that stand for their weights."""
        from rich.console import Console
        from rich.progress import track

        held = self.windows.heldout
        before, after = (None, None) if held is None else (HiddenStates(self.model, held) for _ in range(2))
        console = Console(stderr=True)
        blocks = track(
            list(self.model.model.layers), "quantising", console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        for index, block in enumerate(blocks):
            assert isinstance(block, Block)
            release_memory()  # of the previous block
            work = copy.deepcopy(block).float()
            if before is not None and isinstance(block, Layer):
                before.advance(work, index)
            yield from self._block(work, index)
            if after is not None and isinstance(block, Layer):
                after.advance(work, index)
            block.load_state_dict(work.state_dict())
        if held is not None and before is not None and after is not None:
            losses = [math.exp(states.loss()) for states in (before, after)]
            text = self.windows.heldout_text or ""
            self.report.perplexity = Perplexity(losses[0], losses[1], held.shape[0] * (held.shape[1] - 1), text)

    def _block(self, block: Block, index: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Quantise a block in FP32; its weights become what is stored."""
        inputs, errors = None, dict[str, float]()
        if self.calibration is not None:
            with recording(block) as inputs:
                for _ in self.calibration.through(block, index):
                    pass
            if self.method == "awq" and self.format != "fp8":
                awq.fold(block, inputs, self.format, MIN_ROWS)
        for name, module in block.named_modules():
            if isinstance(module, Experts):
                parts = self._experts(module, name, inputs, index)
            elif isinstance(module, Linear) and self._takes(module, name):
                gram, rows = (None, 0) if inputs is None else (inputs.gram(name), inputs.count(name))
                parts = iter([(name, module.weight, self._round(module.weight, gram, rows, name, index), gram)])
            else:
                continue
            for own, weight, rounded, gram in parts:
                errors[own] = relative(output_error(rounded.value - weight, gram), output_error(weight, gram))
                weight.copy_(rounded.value)
                yield f"model.layers.{index}.{own}", rounded.stored
        self.report.layers.append(LayerError(f"model.layers.{index}", errors))
        if self.calibration is not None:
            self.calibration.advance(block, index)

    def _takes(self, module: nn.Module, name: str) -> bool:
        """Releases in FP8 have latent attention's up-projections in it, but no multi-token module's projection."""
        return name != "eh_proj" if self.format == "fp8" else not isinstance(module, UpProjection)

    def _experts(
        self, module: Experts, name: str, inputs: LinearInputs | None, index: int
    ) -> Iterator[tuple[str, Tensor, Rounded, Tensor | None]]:
        """An expert's name, weight, rounded weight and XᵀX, of each expert; `down_proj` sees the quantised others."""
        for e, (gate_up, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
            x = None if inputs is None else inputs.rows_of(name.removesuffix(".experts"), e)
            rows, gram = (0, None) if x is None else (len(x), x.T @ x)
            for part, weight in zip(("gate_proj", "up_proj"), gate_up.chunk(2), strict=True):
                own = f"{name}.{e}.{part}"
                yield own, weight, self._round(weight, gram, rows, own, index), gram if rows else None
            h = None if x is None else swiglu_joined(linear(x, gate_up))
            gram, own = None if h is None else h.T @ h, f"{name}.{e}.down_proj"
            yield own, down, self._round(down, gram, rows, own, index), gram if rows else None

    def _round(self, weight: Tensor, gram: Tensor | None, rows: int, name: str, index: int) -> Rounded:
        if self.format == "fp8":
            numbers, scales = round_weight(weight, FP8_BLOCK)
            value = decode(numbers.view(torch.uint8), scales, FP8_BLOCK, weight.shape[1])
            return Rounded({"weight": numbers, f"weight{SCALE_SUFFIX}": scales}, value)
        bits: Bits = self.format
        if self.method != "rtn" and rows < MIN_ROWS:
            self.report.rounded_to_nearest.append(f"model.layers.{index}.{name}")
        if self.method == "gptq" and gram is not None and rows >= MIN_ROWS:
            q, scales = gptq(weight, gram, bits)
        else:
            q, scales = round_nearest(weight, bits)
        return Rounded(pack_tensors(q, scales, bits), dequantized(q, scales, bits))
