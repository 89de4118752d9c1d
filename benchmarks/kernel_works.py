"""What kernels.py times: each kernel's call on data of a small model's size, with the bytes and operations it needs.

Bytes are what must be read and written once, a multiply-add is two operations. Sizes are SmolLM2-135M's where a kernel
has none of its own. Data that a step reads from memory (weights, KV cache) are several times any cache. Run as a
program, it times them in this process and writes the figures to a file.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rorqual import strict_json
from rorqual.kernels.adamw import BLOCK, Coefficients, adamw_8bit, adamw_bfloat16
from rorqual.kernels.block_scaled import decode, quantize
from rorqual.kernels.cross_entropy import linear_cross_entropy, softmax_grad_
from rorqual.kernels.dense_attention import attention
from rorqual.kernels.exact.linear import product
from rorqual.kernels.linear import grouped_linear
from rorqual.kernels.norm import rms_norm
from rorqual.kernels.number_formats import FP8_TILE
from rorqual.kernels.paged_attention import grouped_attention, latent_attention
from rorqual.kernels.quantized_linear import GROUP, QuantizedWeight, pack, quantized_linear
from rorqual.kernels.sample import SamplingFilter, sample
from rorqual.kernels.swiglu import swiglu
from rorqual.process_tuning import tune

WIDTH, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY = 576, 1536, 9, 3, 64, 49152
SECONDS = 0.2  # of one timing
SLOW = 2.0  # seconds of a call that is timed once
PAGE = 16  # tokens of a block of the KV cache


@dataclass(frozen=True)
class Work:
    """One call of a kernel. bytes: read and written; operations: of floating point, or of integers in their place.
    learns: with gradients; without, as in decoding, which some kernels are for alone.
    """

    call: Callable[[], object]
    bytes: float
    operations: float = 0.0
    learns: bool = False


def works(quick: bool) -> Iterator[tuple[str, Work]]:
    """By name, one after the other, so that only one's data are in memory."""
    torch.manual_seed(0)
    yield from _packed_products(quick)
    yield from _decode_attention(quick)
    yield from _training_products(quick)
    yield from _rows(quick)
    yield from _optimizers(quick)


def _packed_products(quick: bool) -> Iterator[tuple[str, Work]]:
    size, copies = (256, 2) if quick else (4096, 24)  # 16 M weights a matrix, as in a layer of a 7 B model
    for bits in (4, 8):
        q = torch.randint(0, 1 << bits, (1, size, size), dtype=torch.uint8)
        groups = size // GROUP if bits == 4 else 1
        packed = pack("int4" if bits == 4 else "int8", q, torch.full((1, size, groups), 0.01))
        turn = itertools.cycle([replace(packed, data=packed.data.clone()) for _ in range(copies)])
        for rows in (1, 32, 512):
            x = torch.randn(rows, size)
            name = f"int{bits} product, {rows} row{'s' if rows > 1 else ''}"
            yield name, Work(_product(x, turn), packed.data.nbytes + 2 * x.nbytes, 2 * rows * size**2)


def _product(x: Tensor, weights: Iterator[QuantizedWeight]) -> Callable[[], object]:
    return lambda: quantized_linear(x, next(weights))


def _decode_attention(quick: bool) -> Iterator[tuple[str, Work]]:
    sequences, context = (2, 64) if quick else (32, 1024)
    pages = context // PAGE
    tables = torch.randperm(sequences * pages, dtype=torch.int32).view(sequences, pages)
    lengths = torch.full((sequences,), context, dtype=torch.int32)
    q = torch.randn(sequences, HEADS, HEAD)
    k, v = torch.randn(2, sequences * pages, PAGE, KV_HEADS, HEAD)
    yield (
        "attention of a decode step (GQA)",
        Work(
            lambda: grouped_attention(q, k, v, tables, lengths, HEAD**-0.5),
            k.nbytes + v.nbytes,
            4 * sequences * context * HEADS * HEAD,
        ),
    )
    heads, latent, rope = 16, 512, 64  # V3's widths, an eighth of its heads
    q_latent, q_rope = torch.randn(sequences, heads, latent), torch.randn(sequences, heads, rope)
    kept, k_rope = torch.randn(sequences * pages, PAGE, latent), torch.randn(sequences * pages, PAGE, rope)
    yield (
        "attention of a decode step (MLA)",
        Work(
            lambda: latent_attention(q_latent, q_rope, kept, k_rope, tables, lengths, 0.1),
            kept.nbytes + k_rope.nbytes,
            2 * sequences * context * heads * (2 * latent + rope),
        ),
    )


def _training_products(quick: bool) -> Iterator[tuple[str, Work]]:
    batch, length, tokens = (1, 64, 64) if quick else (4, 512, 2048)
    q = torch.randn(batch, HEADS, length, HEAD, requires_grad=True)
    k = torch.randn(batch, KV_HEADS, length, HEAD, requires_grad=True)
    v = torch.randn(batch, KV_HEADS, length, HEAD, requires_grad=True)
    lower = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    forward = 2 * batch * HEADS * length**2 * HEAD  # the half that a causal mask leaves
    yield from _passes(
        "causal attention", lambda: attention(q, k, v, lower, False, HEAD**-0.5), [q, k, v], 2 * q.nbytes, forward, 3.5
    )
    experts, inner = 8, 512
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    w = torch.randn(experts, inner, WIDTH, requires_grad=True)
    ends = torch.arange(1, experts + 1, dtype=torch.int32) * (tokens // experts)
    yield from _passes(
        "products of 8 experts", lambda: grouped_linear(x, w, ends), [x, w], x.nbytes + w.nbytes,
        2 * tokens * WIDTH * inner, 3.0,
    )  # fmt: skip
    hidden = torch.randn(tokens // 4, WIDTH, requires_grad=True)
    head = torch.randn(1024 if quick else VOCABULARY, WIDTH, requires_grad=True)
    targets, weights = torch.zeros(len(hidden), dtype=torch.long), torch.ones(len(hidden))
    yield (
        "cross-entropy with its products, both passes",
        Work(
            lambda: torch.autograd.grad(linear_cross_entropy(hidden, head, targets, weights), (hidden, head)),
            2 * head.nbytes,
            6 * hidden.numel() * len(head),
            learns=True,
        ),
    )
    rows, weight = torch.randn(tokens // 4, WIDTH), torch.randn(INNER, WIDTH)
    yield "exact product", Work(lambda: product(rows, weight), weight.nbytes, 2 * rows.numel() * INNER)


def _rows(quick: bool) -> Iterator[tuple[str, Work]]:
    rows = 64 if quick else 4096  # a micro-batch; larger tensors would time the system's fresh pages too
    x = torch.randn(rows, WIDTH, requires_grad=True)
    weight = torch.ones(WIDTH, requires_grad=True)
    yield from _passes("RMSNorm", lambda: rms_norm(x, weight, 1e-5), [x, weight], 2 * x.nbytes, 0, 2.5)
    gate, up = (torch.randn(rows, INNER, requires_grad=True) for _ in range(2))
    yield from _passes("SwiGLU", lambda: swiglu(gate, up), [gate, up], 3 * gate.nbytes, 0, 8 / 3)
    logits = torch.randn(rows // 32, VOCABULARY)
    targets = torch.zeros(len(logits), dtype=torch.long)
    share = torch.full((len(logits),), 1e-3)
    yield "softmax and its gradient", Work(lambda: softmax_grad_(logits, targets, share), 2 * logits.nbytes)
    some, uniform = torch.randn(32, VOCABULARY), torch.rand(32)
    chosen = SamplingFilter(0.6, top_p=0.95)
    yield "sampling, top-p 0.95", Work(lambda: sample(some, chosen, uniform), some.nbytes)
    wide = torch.randn(rows, INNER)
    yield "rounding to FP8 tiles", Work(lambda: quantize(wide, FP8_TILE), 1.25 * wide.nbytes)
    found = quantize(wide, FP8_TILE)
    codes, scales = found.codes, found.scales
    assert codes is not None
    yield "FP8 tiles to FP32", Work(lambda: decode(codes, scales, FP8_TILE, INNER), 1.25 * wide.nbytes)


def _optimizers(quick: bool) -> Iterator[tuple[str, Work]]:
    count = 1 << (16 if quick else 24)
    weight, grad = torch.randn(2, count)
    step = Coefficients.of(1e-4, (0.9, 0.95), 0.1, 1e-8, 10)
    first, second = torch.zeros(2, count, dtype=torch.bfloat16)
    yield "AdamW, BF16 moments", Work(lambda: adamw_bfloat16(weight, grad, first, second, step), 20 * count)
    m, v = torch.zeros(2, count, dtype=torch.uint8)
    of_m, of_v = torch.ones(2, count // BLOCK)
    yield "AdamW, 8-bit moments", Work(lambda: adamw_8bit(weight, grad, m, v, of_m, of_v, step), 16 * count)


def _passes(
    name: str, forward: Callable[[], Tensor], inputs: list[Tensor], bytes: float, operations: float, both: float
) -> Iterator[tuple[str, Work]]:
    """The forward pass, then both passes, which need `both` times what the first does."""
    yield f"{name}, forward", Work(forward, bytes, operations)
    grad = torch.ones_like(forward())
    yield (
        f"{name}, both passes",
        Work(lambda: torch.autograd.grad(forward(), inputs, grad), both * bytes, both * operations, learns=True),
    )


def seconds_of(call: Callable[[], object], quick: bool) -> float:
    """Median seconds of a call."""
    began = time.perf_counter()
    call()
    first = time.perf_counter() - began
    if quick or first > SLOW:
        return first
    began = time.perf_counter()
    call()  # the first one allocates and, at some levels, compiles
    times = max(1, round(SECONDS / (time.perf_counter() - began)))
    found: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(times):
            call()
        found.append((time.perf_counter() - began) / times)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    tune()
    found: dict[str, dict[str, float]] = {}
    for name, work in works(args.quick):
        with torch.set_grad_enabled(work.learns):
            seconds = seconds_of(work.call, args.quick)
        found[name] = {"seconds": seconds, "bytes": work.bytes, "operations": work.operations}
    args.out.write_text(strict_json.dumps(found))


if __name__ == "__main__":
    main()
