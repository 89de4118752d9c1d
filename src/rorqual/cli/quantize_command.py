"""rorqual quantize."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from rorqual import strict_json
from rorqual.cli.options import NO_LIMIT, AsJson, check_choice, expand_path, find_model, within

if TYPE_CHECKING:
    from rich.table import Table

    from rorqual.precision.quantization_report import QuantizationReport
    from rorqual.precision.quantize_checkpoint import Format, Method


def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a Hugging Face directory")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="the directory to write")],
    format: Annotated[
        str,
        typer.Option(help="int4 (a scale for 32 weights), int8 (a scale an output) or fp8 (a scale for 128×128)"),
    ] = "int4",
    method: Annotated[
        str, typer.Option(help="rtn (round to nearest), or gptq or awq, which are calibrated on text; fp8: rtn")
    ] = "rtn",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="text to calibrate on: .txt, .md, .jsonl or .parquet with text or messages; gptq and awq take "
            "Python's documentation by default"
        ),
    ] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(help="text for the perplexity before and after; default: the end of what is read to calibrate"),
    ] = None,
    samples: Annotated[
        int, typer.Option(callback=within(1, NO_LIMIT), help="windows of text to calibrate on, at most")
    ] = 128,
    sequence_length: Annotated[
        int | None,
        typer.Option(callback=within(16, NO_LIMIT), help="tokens of a window; default: 512, or the model's context"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Quantise a model's weights to int4, int8 or FP8, in the formats that transformers and vLLM read.

    Reports the perplexity before and after, the error of each layer and the size.
    """
    from rorqual.console import output
    from rorqual.precision.calibration_text import TextSettings
    from rorqual.precision.quantize_checkpoint import quantize_checkpoint

    check_choice("--format", format, ("int4", "int8", "fp8"))
    check_choice("--method", method, ("rtn", "gptq", "awq"))
    destination = expand_path(destination)
    text = TextSettings(calibration and expand_path(calibration), heldout and expand_path(heldout), samples,
                        sequence_length)  # fmt: skip
    source = find_model(str(model))
    report = quantize_checkpoint(source, destination, cast("Format", format), cast("Method", method), text)
    if as_json:
        print(strict_json.dumps(report.to_dict() | {"destination": str(destination)}))
        return
    console = output(highlight=True)
    console.print(layers_table(report))
    for line in summary(report):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    print(f"{destination}: try: rorqual chat {destination}")


def layers_table(report: "QuantizationReport") -> "Table":
    """A row a layer."""
    from rich.table import Table

    of = "weights" if report.calibration is None else "outputs on the calibration text"
    out = Table(title=f"{report.format}, {report.method}", caption=f"relative errors of {of}, root mean squares")
    out.add_column("layer")
    out.add_column("mean", justify="right")
    out.add_column("largest", justify="right")
    out.add_column("of")
    for layer in report.layers:
        worst = layer.largest
        out.add_row(layer.layer, f"{100 * layer.mean:.2f} %", f"{100 * layer.linears[worst]:.2f} %", worst)
    return out


def summary(report: "QuantizationReport") -> list[str]:
    """Size, perplexity, and what was left out."""
    before, after = report.bytes_before / 1e6, report.bytes_after / 1e6
    lines = [f"size: {before:.1f} MB → {after:.1f} MB"]
    if report.calibration is not None:
        lines.append(f"calibrated on {report.calibration_tokens} tokens of {report.calibration}")
    if (found := report.perplexity) is None:
        lines.append("perplexity: not measured, since there is no text; give --heldout FILE or --calibration FILE")
    else:
        lines.append(
            f"perplexity on {found.tokens} held-out tokens of {found.text}: {found.before:.3f} → {found.after:.3f} "
            f"({100 * found.change:+.2f} %)"
        )
    if report.rounded_to_nearest:
        lines.append(
            f"rounded to nearest, since too few tokens of the text reach them: {len(report.rounded_to_nearest)} "
            f"linears, such as {report.rounded_to_nearest[0]}"
        )
    return lines
