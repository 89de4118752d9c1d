"""The fastest dtype of this machine, for recipes, the engine, benchmarks and the planner.

Without BF16 units PyTorch emulates every BF16 product, some 70 times slower than FP32 on an AVX2 machine. So no default
names a dtype; `auto` is resolved here.
"""

import functools
import sys
import time

import torch

from rorqual.kernels.dtype_names import COMPUTE

SIZE = 256  # of the square products that are timed: 25 ms each where BF16 is emulated
MIN_SECONDS, MIN_RUNS = 0.05, 3  # of products a dtype; the fastest counts, since other processes disturb


def compute_dtype(name: str = "auto", device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype that a recipe or an option names; "auto": the fastest on `device`.

    Warns once on stderr if BF16 is requested and emulated.
    """
    if name == "auto":
        return fastest_dtype(device)
    dtype, kind = COMPUTE[name], torch.device(device).type
    if dtype is torch.bfloat16 and kind != "meta" and fastest_dtype(device) is not dtype:
        _warn_emulated(kind)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name in recipes and options."""
    return str(dtype).removeprefix("torch.")


def fastest_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """BF16 where the device has units for it, else FP32."""
    return _fastest(torch.device(device).type)


@functools.cache
def _fastest(kind: str) -> torch.dtype:
    if kind == "cuda":
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if not _may_have_bf16():
        return torch.float32
    # Measured, since torch may be configured not to use the units, and other processors have no flag here.
    return torch.bfloat16 if bf16_speed() > 1 else torch.float32


def _may_have_bf16() -> bool:
    """False if the processor's flags rule BF16 units out; True where they do not tell (ARM)."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    found = torch.cpu.get_capabilities()
    if found.get("architecture") != "x86_64":
        return True
    return any(found.get(flag, False) for flag in ("avx512_bf16", "amx_bf16", "avx_ne_convert"))


@functools.cache
def bf16_speed() -> float:
    """Speed of BF16 products on the CPU relative to FP32; measured in some 0.1 s, once a process."""
    seconds: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(SIZE, SIZE, dtype=dtype)
        out = a @ a
        times: list[float] = []
        while sum(times) < MIN_SECONDS or len(times) < MIN_RUNS:
            start = time.perf_counter()
            torch.mm(a, a, out=out)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


@functools.cache
def _warn_emulated(kind: str) -> None:
    times = f", products some {1 / bf16_speed():.0f} times as slow as in float32" if kind == "cpu" else ""
    print(
        f"rorqual: bfloat16 is emulated on this {kind}{times}; leave dtype at auto, or ask for float32", file=sys.stderr
    )
