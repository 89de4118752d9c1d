"""What `rorqual quantize` costs in perplexity and saves in bytes, by format and method.

Two models. SmolLM2-135M-Instruct, whose only source here is a Q4_1 file: its weights are 4-bit numbers with minima
already, expanded and kept in BF16, and int4 rounds them a second time, to another grid. And a small mixture of experts
with latent attention, trained here, whose weights were never rounded. The text is English that comes with Python, its
language reference and (for the small model) documentation strings; a quarter of the documents is held out from
calibration, for the small model also from training. Both sides of a perplexity are computed in FP32 from the weights
as stored, so nothing but their rounding counts.
"""

import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from balance import LENGTH, SIZES, Learner, documents
from common import arguments, program, report
from rorqual.checkpoint.gguf_import import import_model
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.data.datasets import open_tokenizer
from rorqual.data.tokenizer import load_tokenizer, save_tokenizer
from rorqual.model import ModelConfig
from rorqual.precision.calibration_text import TextSettings
from rorqual.precision.quantize_checkpoint import Format, Method, quantize_checkpoint
from rorqual.recipe import DataSection, Source, TokenizerSection

VARIANTS: list[tuple[Format, Method]] = [
    ("fp8", "rtn"), ("int8", "rtn"), ("int4", "rtn"), ("int4", "gptq"), ("int4", "awq"),
]  # fmt: skip
BARS = {("int8", "rtn"): 0.005, ("int4", "gptq"): 0.04, ("int4", "awq"): 0.04}  # how much perplexity may rise


def split(texts: Iterable[str], folder: Path) -> tuple[Path, Path]:
    """Files of three quarters of the documents, and of the others."""
    parts: list[list[str]] = [[], []]
    for i, text in enumerate(texts):
        parts[i % 4 == 3].append(json.dumps({"text": text}))
    paths = folder / "calibration.jsonl", folder / "heldout.jsonl"
    for path, lines in zip(paths, parts, strict=True):
        path.write_text("\n".join(lines) + "\n")
    return paths


def smollm2(folder: Path) -> None:
    """The Q4_1 file's weights, in BF16."""
    import_model("smollm2", folder / "fp32")
    save_model(load_model(folder / "fp32", torch.bfloat16), folder / "model", load_tokenizer(folder / "fp32"))


def trained(folder: Path, text: Path, steps: int) -> None:
    """A mixture of experts that has learnt from `text`, in BF16."""
    data = DataSection(sources=[Source(path=str(text))], sequence_length=LENGTH, valid_fraction=0.01)
    tokenizer = open_tokenizer(TokenizerSection(vocab_size=2048), data)
    config = ModelConfig(model_type="deepseek_v3", vocab_size=len(tokenizer), **SIZES)
    learner = Learner("bias", config, data, tokenizer, folder / "cache", 0)
    learner.learn(steps, steps)
    save_model(learner.trainer.model.to(torch.bfloat16), folder / "model", tokenizer)
    save_tokenizer(tokenizer, folder / "model")


def variants(folder: Path, text: TextSettings) -> list[dict[str, Any]]:
    """One row a format and method, the unquantised model first."""
    rows: list[dict[str, Any]] = []
    for format, method in VARIANTS:
        start = time.perf_counter()
        found = quantize_checkpoint(folder / "model", folder / f"{format}-{method}", format, method, text)
        seconds, quality = time.perf_counter() - start, found.perplexity
        assert quality is not None
        if not rows:
            rows.append({"name": "bf16", "perplexity": quality.before, "megabytes": found.bytes_before / 1e6})
        row = {"name": f"{format} {method}", "perplexity": quality.after, "megabytes": found.bytes_after / 1e6}
        row |= {"change": quality.change, "seconds": seconds, "tokens": quality.tokens}
        row |= {"output_error": sum(layer.mean for layer in found.layers) / len(found.layers)}
        row |= {"rounded_to_nearest": len(found.rounded_to_nearest)}
        if (bar := BARS.get((format, method))) is not None:
            row |= {"bar": bar, "met": quality.change <= bar}
        rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> list[Any]:
    change = f"{100 * row['change']:+.2f} %" if "change" in row else "–"
    bar = f"{100 * row['bar']:g} %: {'met' if row['met'] else 'missed'}" if "bar" in row else "–"
    error = f"{100 * row['output_error']:.2f} %" if "output_error" in row else "–"
    return [row["name"], f"{row['perplexity']:.3f}", change, bar, error, f"{row['megabytes']:.2f}"]


def main() -> None:
    args = arguments(__doc__)
    samples, steps = (4, 20) if args.quick else (64, 600)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name) / "small", Path(name) / "large"
        for folder in (small, large):
            folder.mkdir()
        calibration, heldout = split(documents(), small)
        trained(small, calibration, steps)
        found["trained here"] = variants(small, TextSettings(calibration, heldout, 4 * samples, LENGTH))
        if not args.quick:
            calibration, heldout = split((topics[topic] for topic in sorted(topics)), large)
            smollm2(large)
            found["SmolLM2-135M-Instruct, from Q4_1"] = variants(large, TextSettings(calibration, heldout, samples))
    ratios = {
        f"perplexity-{row['name'].replace(' ', '-')}/{model.partition(',')[0].replace(' ', '-').lower()}-bf16": 1
        / (1 + row["change"])
        for model, rows in found.items()
        for row in rows[1:]
    }
    columns = ["", "perplexity", "change", "bar", "error of outputs", "MB"]
    tables = [(model, columns, [cells(row) for row in rows]) for model, rows in found.items()]
    report("quantize", args, ratios, {"models": found, "samples": samples}, tables, ["torch"])


if __name__ == "__main__":
    program(main)
