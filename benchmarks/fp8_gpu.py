"""FP8 on a GPU: products, rounding and a training step, each beside BF16 in the same run.

Products: 4096³, and those of V3's experts on one of eight ranks (32 of 256; inner width 2048), also by PyTorch's
scaled_mm where the chip has it. Rounding: bytes moved a second, as a share of what a copy moves. Every kernel is first
compared with its reference; one that fails is named. A V3-style model goes forward and back with `fp8` and in BF16.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from common import arguments, program, ratio_of_rounds, report, take_turns
from rorqual.errors import UserError
from rorqual.kernels import gpu
from rorqual.kernels.block_scaled import BlockScaled, block_starts_on_device, quantize, quantize_reference
from rorqual.kernels.number_formats import FP8_BLOCK, FP8_TILE, MXFP8, NumberFormat
from rorqual.kernels.quantize_swiglu import quantize_swiglu, quantize_swiglu_reference
from rorqual.kernels.scaled_linear import (
    input_gradient_product,
    output_product,
    quantize_weight,
    weight_gradient_product,
)
from rorqual.model import ModelConfig, Transformer
from rorqual.precision.convert import convert
from rorqual.train import set_seed
from sides import MIXTURE

EXPERTS, WIDTH, INNER = 32, 7168, 2048  # of V3 on one of eight ranks
Work = Callable[[], Any]


def seconds(work: Work, device: str, runs: int) -> float:
    """Of one call, the mean of `runs` that follow one another."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(runs):
            work()
        return (time.perf_counter() - start) / runs
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(runs):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / runs


class Bench:
    def __init__(self, device: str, runs: int, rounds: int) -> None:
        self.device, self.runs, self.rounds = device, runs, rounds
        self.failed: dict[str, str] = {}

    def attempt(self, name: str, work: Work) -> Any:
        """What the work returns; None, and a line in the report, if it fails."""
        try:
            return work()
        except Exception as e:
            self.failed[name] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            return None

    def times(self, works: dict[str, Work]) -> dict[str, list[float]]:
        """Seconds by name, round by round; a work that fails is out."""
        good = {name: work for name, work in works.items() if self.attempt(name, lambda w=work: (w(), True)[1])}

        def timed(work: Work) -> Callable[[], float]:
            return lambda: seconds(work, self.device, self.runs)

        return take_turns({name: timed(work) for name, work in good.items()}, self.rounds)


# -- each kernel against its reference


def check_kernels(bench: Bench) -> None:
    for format in (FP8_TILE, FP8_TILE.transposed, FP8_BLOCK, MXFP8, MXFP8.transposed):
        bench.attempt(
            f"check: rounding to {format.name} {format.tile}", lambda f=format: check_rounding(bench.device, f)
        )
    bench.attempt("check: SwiGLU and rounding", lambda: check_swiglu(bench.device))
    for experts in (1, 4):
        for formats in ((FP8_TILE, FP8_BLOCK, FP8_BLOCK), (MXFP8, MXFP8, MXFP8.transposed)):
            for sizes in ((300, 260, 200), (512, 256, 384)):
                name = f"check: {formats[0].name}, {experts} experts, {sizes}"
                bench.attempt(name, lambda e=experts, f=formats, s=sizes: check_products(bench.device, e, f, s))


def check_rounding(device: str, format: NumberFormat) -> None:
    x = torch.randn(300, 514, device=device) * torch.exp2(torch.randint(-12, 12, (300, 514), device=device).float())
    found, right = quantize(x, format), quantize_reference(x, format)
    if not (torch.equal(found.scales, right.scales) and torch.equal(*(t.kept[0] for t in (found, right)))):
        raise AssertionError("codes or scales are not the reference's")


def check_swiglu(device: str) -> None:
    x = torch.randn(300, 512, device=device)
    found, right = quantize_swiglu(x, FP8_TILE), quantize_swiglu_reference(x, FP8_TILE)
    apart = (found.values - right.values).norm() / right.values.norm()
    if not apart < 2e-3:
        raise AssertionError(f"{apart:.1e} apart from the reference")


def check_products(device: str, experts: int, formats: tuple[NumberFormat, ...], sizes: tuple[int, int, int]) -> None:
    made = Products(device, experts, *sizes, formats=formats)
    for name, (product, left, right) in made.products().items():
        found, exact = product(left, right, experts, made.ends), made.exact(name, left, right)
        apart = float((found.double() - exact).norm() / exact.norm())
        # Tensor cores keep some 14 bits of a sum within a tile (V3 §3.3.2).
        if not apart < 1e-3:
            raise AssertionError(f"the {name} is {apart:.1e} apart from the product in float64")


class Products:
    """The rounded factors of one linear, or of experts whose rows are spread evenly but for a remainder."""

    def __init__(
        self, device: str, experts: int, M: int, K: int, N: int,
        formats: tuple[NumberFormat, ...] = (FP8_TILE, FP8_BLOCK, FP8_BLOCK),
    ) -> None:  # fmt: skip
        generator = torch.Generator(device).manual_seed(0)
        self.experts = experts
        cuts = [M * (e + 1) // experts for e in range(experts)]
        self.ends = torch.tensor(cuts, dtype=torch.int32, device=device)
        self.x, self.grad, self.weight = (
            torch.randn(*shape, device=device, dtype=torch.bfloat16, generator=generator)
            for shape in ((M, K), (M, N), (experts, N, K))
        )
        self.formats = formats
        self.flops = 2 * M * K * N

    def products(self) -> dict[gpu.Kind, tuple[Callable[..., torch.Tensor], BlockScaled, BlockScaled]]:
        activation, weight, transposed = self.formats
        turned, starts = activation.transposed, None
        if self.experts > 1:
            starts = block_starts_on_device(self.ends, turned.tile[0], len(self.x))
        return {
            "output": (output_product, quantize(self.x, activation), quantize_weight(self.weight, weight)),
            "input gradient": (
                input_gradient_product,
                quantize(self.grad, activation),
                quantize_weight(self.weight, transposed, by_columns=True),
            ),
            "weight gradient": (
                weight_gradient_product,
                quantize(self.grad, turned, starts),
                quantize(self.x, turned, starts),
            ),
        }

    def exact(self, name: gpu.Kind, left: BlockScaled, right: BlockScaled) -> torch.Tensor:
        a, b = left.values.double(), right.values.double()
        cuts = self.ends[:-1].long().cpu()
        if name == "weight gradient":
            return torch.stack([p.T @ q for p, q in zip(a.tensor_split(cuts), b.tensor_split(cuts), strict=True)])
        b = b.view(self.experts, -1, b.shape[1])
        b = b.transpose(1, 2) if name == "output" else b
        return torch.cat([p @ own for p, own in zip(a.tensor_split(cuts), b, strict=True)])

    def in_bf16(self) -> dict[gpu.Kind, Work]:
        x, grad, weight, ends = self.x, self.grad, self.weight, self.ends
        if self.experts == 1:
            return {
                "output": lambda: x @ weight[0].T,
                "input gradient": lambda: grad @ weight[0],
                "weight gradient": lambda: grad.T @ x,
            }
        return {
            "output": lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=ends),
            "input gradient": lambda: F.grouped_mm(grad, weight, offs=ends),
            "weight gradient": lambda: F.grouped_mm(grad.T, x, offs=ends),
        }


# -- what is measured


def measure_products(bench: Bench, label: str, made: Products, rows: list[list[Any]], ratios: dict[str, float]) -> Any:
    figures, plain = {}, made.in_bf16()
    for name, (product, left, right) in made.products().items():
        works: dict[str, Work] = {"bf16": plain[name]}
        factors = [gpu.Factor(t.format, t.shape, t.every) for t in (left, right)]
        chip = gpu.chip(left.scales.device)
        if gpu.way(name, factors[0], factors[1], made.experts, chip) == "torch":
            works["scaled_mm"] = lambda p=product, a=left, b=right: p(a, b, made.experts, made.ends, torch.bfloat16)
        if chip.triton:
            works["triton"] = lambda n=name, a=left, b=right: by_triton(n, a, b, made)
        found = bench.times({f"{label}, {name}: {side}": work for side, work in works.items()})
        found = {side.rpartition(": ")[2]: values for side, values in found.items()}
        figures[name] = found
        for side in found.keys() & {"scaled_mm", "triton"}:
            if "bf16" in found:
                ratios[f"{label}-{name}-{side}/bf16".replace(" ", "-")] = ratio_of_rounds(found["bf16"], found[side])[
                    "median"
                ]
        cells = [made.flops / statistics.median(found[s]) / 1e12 if s in found else "–" for s in SIDES]
        rows.append([f"{label}, {name}", *cells])
    return figures


SIDES = ("bf16", "scaled_mm", "triton")


def by_triton(name: gpu.Kind, left: BlockScaled, right: BlockScaled, made: Products) -> torch.Tensor:
    from rorqual.kernels.triton import gemm

    if name == "weight gradient":
        return gemm.weight_gradient(left, right, made.experts, made.ends, torch.bfloat16)
    return gemm.rows_product(left, right, made.experts, made.ends, torch.bfloat16, name == "input gradient")


def measure_rounding(bench: Bench, size: int, rows: list[list[Any]], ratios: dict[str, float]) -> Any:
    """Bytes a second of rounding kernels: BF16 in, codes and scales out."""
    x = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    works: dict[str, tuple[Work, float]] = {"copy": (x.clone, 4.0 * x.numel())}
    for format in (FP8_TILE, FP8_TILE.transposed, FP8_BLOCK, MXFP8):
        works[f"{format.name} {format.tile}"] = lambda f=format: quantize(x, f), 2 * x.numel() + _size(x.shape, format)
    half = (x.shape[0], x.shape[1] // 2)
    works["SwiGLU, FP8 1×128"] = lambda: quantize_swiglu(x, FP8_TILE), 2 * x.numel() + _size(half, FP8_TILE)
    found = bench.times({name: work for name, (work, _) in works.items()})
    rates = {name: [works[name][1] / t for t in values] for name, values in found.items()}
    for name, values in rates.items():
        share = ratio_of_rounds(values, rates["copy"])["median"]
        if name != "copy":
            ratios[f"rounding-{name}/copy".replace(" ", "-")] = share
        rows.append([name, statistics.median(values) / 1e9, share])
    return rates


def _size(shape: tuple[int, ...], format: NumberFormat) -> float:
    tiles = format.tiles(shape[0], shape[1])
    return shape[0] * shape[1] + 4 * tiles[0] * tiles[1]


def measure_step(bench: Bench, config: ModelConfig, batch: tuple[int, int]) -> dict[str, list[float]]:
    """Seconds of forward and backward pass of one batch."""
    tokens = torch.randint(3, config.vocab_size, batch, device=bench.device)

    def step(precision: str) -> Work:
        set_seed(0)
        model = (
            Transformer(config).to(bench.device, torch.bfloat16 if bench.device == "cuda" else torch.float32).train()
        )
        if precision != "bf16":
            convert(model, precision)

        def work() -> None:
            model.zero_grad()
            model(tokens).float().square().mean().backward()

        return work

    return bench.times({name: step(name) for name in ("bf16", "fp8")})


def main() -> None:
    args = arguments(__doc__, device="cuda")
    if not args.quick and args.device != "cuda":
        raise UserError(f"--device {args.device}: figures are of a GPU; add --quick to see that it runs")
    bench = Bench(args.device, *((1, 1) if args.quick else (10, 5)))
    figures: dict[str, Any] = {"products": {}}
    ratios: dict[str, float] = {}
    rows: list[list[Any]] = []
    check_kernels(bench)
    sizes: dict[str, tuple[int, int, int, int]] = {"4096³": (1, 4096, 4096, 4096)}
    for m in (8192, 32768):
        sizes[f"gate and up, {m} rows"] = (EXPERTS, m, WIDTH, 2 * INNER)
        sizes[f"down, {m} rows"] = (EXPERTS, m, INNER, WIDTH)
    if args.quick:
        sizes = {"128³": (1, 128, 128, 128), "experts": (4, 200, 256, 128)}
    for label, shape in sizes.items():
        made = bench.attempt(label, lambda s=shape: Products(args.device, *s))
        found = made and bench.attempt(label, lambda k=label, p=made: measure_products(bench, k, p, rows, ratios))
        figures["products"][label] = found
    shares: list[list[Any]] = []
    size = 256 if args.quick else 8192
    figures["rounding"] = bench.attempt("rounding", lambda: measure_rounding(bench, size, shares, ratios))
    batch = (1, 16) if args.quick else (8, 1024)
    config = replace(MIXTURE, num_hidden_layers=2, vocab_size=512) if args.quick else MIXTURE
    steps = bench.attempt("training step", lambda: measure_step(bench, config, batch)) or {}
    figures["training_step_seconds"] = steps
    if steps.keys() >= {"bf16", "fp8"}:
        ratios["training-step-fp8/bf16"] = ratio_of_rounds(steps["bf16"], steps["fp8"])["median"]
    report(
        "fp8_gpu", args, ratios, figures,
        [
            ("TFLOP/s", ["", *SIDES], rows),
            ("Rounding", ["", "GB/s", "of a copy"], shares),
            ("Forward and backward pass", ["", "seconds"], [[k, statistics.median(v)] for k, v in steps.items()]),
        ],
        ["torch", "triton"], bench.failed, set(bench.failed),
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
