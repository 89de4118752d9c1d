"""What this machine computes fastest, decided in one place for recipes, the engine, benchmarks and the planner.

A processor without BF16 units still takes BF16 tensors: PyTorch then emulates every product, some 70 times slower than
in FP32 on an AVX2 machine. So no default names a dtype; `auto` asks here.
"""

import functools
import sys
import time
from typing import Literal

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DtypeName = Literal["auto", "float32", "bfloat16"]
SIZE = 256  # of the square products that are timed: 25 ms each where BF16 is emulated
PATIENCE, TRIES = 0.05, 3  # seconds and products a dtype, at least: the best of them, since other programs disturb


def compute_dtype(name: str = "auto", device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype that a recipe or an option names; "auto": what is fastest on `device`.

    Says once on stderr what BF16 costs where it was asked for and is emulated.
    """
    if name == "auto":
        return fastest_dtype(device)
    dtype = DTYPES[name]
    if dtype is torch.bfloat16 and fastest_dtype(device) is not dtype:
        _warn_emulated(torch.device(device).type)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """As recipes and options write it."""
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
    # Only a product tells: torch may have been told to leave the units alone, and other processors have no flag here.
    return torch.bfloat16 if bf16_speed() > 1 else torch.float32


def _may_have_bf16() -> bool:
    """False where the processor's flags rule it out; where they do not tell (ARM), True."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    found = torch.cpu.get_capabilities()
    if found.get("architecture") != "x86_64":
        return True
    return any(found.get(flag, False) for flag in ("avx512_bf16", "amx_bf16", "avx_ne_convert"))


@functools.cache
def bf16_speed() -> float:
    """How many times as fast as in FP32 a product on the CPU is in BF16; measured in some 0.1 s, once a process."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(SIZE, SIZE, dtype=dtype)
        out = a @ a
        times: list[float] = []
        while sum(times) < PATIENCE or len(times) < TRIES:
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
