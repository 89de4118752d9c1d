"""rows.cpp and decode.cpp from Python: which build fits this processor, when it is used, how it is called."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def capability() -> str | None:
    """The instruction set whose build is in use: avx512, avx2 or portable; None when there is none."""
    found = _library()
    return None if found is None else found[0]


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled functions take these tensors, all of one dtype; else the caller's reference runs.

    torch.compile gets the reference too, which it can fuse with what surrounds it.
    """
    first = tensors[0].dtype
    return (
        first in SUFFIXES
        and all(t.device.type == "cpu" and t.dtype == first and t.stride(-1) == 1 for t in tensors)
        and not torch.compiler.is_compiling()
        and _library() is not None
    )


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Run a compiled function, in the form for `dtype`; tensors are passed as their address."""
    found = _library()
    assert found is not None
    getattr(found[1], f"{name}_{SUFFIXES[dtype]}")(*map(_argument, arguments))


def rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., W] as rows at one distance: x or a copy, and the distance."""
    even = all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.ndim - 2))
    if x.ndim > 1 and even and x.stride(-1) == 1:
        return x, x.stride(-2)
    return x.contiguous(), x.shape[-1]


def _argument(value: Tensor | int | float | None) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)


@functools.cache
def _library() -> tuple[str, ctypes.CDLL] | None:
    """The best build that this processor runs. torch is loaded by now, so its OpenMP threads serve both."""
    levels = {"AVX512": ("avx512", "avx2", "portable"), "AVX2": ("avx2", "portable")}
    for level in levels.get(torch.backends.cpu.get_cpu_capability(), ("portable",)):
        for path in Path(__file__).parent.glob(f"compiled_{level}.*"):
            return level, ctypes.CDLL(str(path))
    return None
