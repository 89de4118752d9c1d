"""The compiled functions from Python: which build fits this processor, when it is used, how it is called."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
INTERFACE = 18  # as in numbers.h: a build left over from other sources is not used
# Arguments: T a tensor of the function's own dtype, F of FP32, I of int64, J of int32, U of uint8, B of bool; n an
# integer, x a number.
SIGNATURES = {
    "softmax_slope": "TnnIFxFF",
    "rms_norm": "TnFnnxTF",
    "rms_norm_backward": "TnTnFFnnTFn",
    "swiglu": "TnTnnnT",
    "swiglu_backward": "TnTnTnnnTnTn",
    "combine": "TFInnnT",
    "combine_backward": "TTFInnnnTF",
    "masked_softmax": "TnnBnnnnx",
    "masked_softmax_backward": "TTnnx",
    "rotate": "TnnnnTTnnnnxTnn",
    "add_into": "FTn",
    "past_attention": "TTTnnnTnnTnnnJnnJnnnnnnxT",
    "draw": "TnnxxnxFIF",
    "extend": "TnnIIII",
    "product": "TnTTJnnnT",  # this and the next two in BF16 alone, and where the processor has_dot_products
    "product_backward": "TnTJnnnT",
    "product_backward_weights": "TnTnJnnnFT",
    "lowbit_product": "TnUnFTJnnnUT",
    "decode_step": "IIFnJnnJFFJnF",
}
DTYPES = {"F": torch.float32, "U": torch.uint8, "I": torch.int64, "J": torch.int32, "B": torch.bool}
KINDS = {"n": ctypes.c_int64, "x": ctypes.c_float}


def capability() -> str | None:
    """The instruction set whose build is in use: avx512, avx2 or portable; None when there is none."""
    found = _library()
    return None if found is None else found[0]


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled functions take these tensors, all of one dtype; else the caller's reference runs.

    torch.compile gets the reference too, which it can fuse with what surrounds it.
    """
    first = tensors[0].dtype
    if first not in SUFFIXES or torch.compiler.is_compiling() or _library() is None:
        return False
    # A list, since this runs ten times a layer and a generator took three times as long.
    return all([t.is_cpu and t.dtype is first and t.stride(-1) == 1 for t in tensors])  # noqa: C419


@functools.cache
def has_dot_products() -> bool:
    """Whether the processor multiplies pairs of BF16 numbers and a build was made for it."""
    found = _library()
    return found is not None and bool(ctypes.c_int64.in_dll(found[1], "dot_products").value)


@functools.cache
def has_matrix_unit() -> bool:
    """Whether products with weights of 8 bits and a scale an output run on the processor's matrix unit (matrix.h)."""
    found = _library()
    return found is not None and bool(ctypes.c_int64.in_dll(found[1], "matrix_unit").value)


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Run a compiled function, in the form for `dtype`; tensors are passed as their address, None as none.

    Raises TypeError for a tensor it would misread: what lies elsewhere than on the CPU, has another dtype, or is not
    contiguous (of `dtype` and bool: in its last dimension).
    """
    values: list[int | float | None] = []
    for kind, value in zip(SIGNATURES[name], arguments, strict=True):
        if isinstance(value, Tensor):
            whole = value.is_contiguous() if kind in "FIJU" else value.stride(-1) == 1 or value.shape[-1] < 2
            if not value.is_cpu or value.dtype is not DTYPES.get(kind, dtype) or not whole:
                found = f"{value.dtype} on {value.device}, strides {value.stride()}"
                raise TypeError(f"{name}: argument {len(values)} is {found}")
            values.append(value.data_ptr())
        else:
            values.append(value)
    library = _library()
    assert library is not None
    getattr(library[1], f"{name}_{SUFFIXES[dtype]}")(*values)


def rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., W] as rows at one distance: x or a copy, and the distance."""
    even = all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.ndim - 2))
    if x.ndim > 1 and even and x.stride(-1) == 1:
        return x, x.stride(-2)
    return x.contiguous(), x.shape[-1]


@functools.cache
def _library() -> tuple[str, ctypes.CDLL] | None:
    """The best build that this processor runs. torch is loaded by now, so its OpenMP threads serve both."""
    levels = {"AVX512": ("avx512", "avx2", "portable"), "AVX2": ("avx2", "portable")}
    for level in levels.get(torch.backends.cpu.get_cpu_capability(), ("portable",)):
        try:
            library = ctypes.CDLL(str(Path(__file__).parent / f"compiled_{level}.so"))
            if ctypes.c_int64.in_dll(library, "interface").value != INTERFACE:
                continue
        except (OSError, ValueError):  # not there, or not loadable here; older than the number
            continue
        for name, kinds in SIGNATURES.items():
            for suffix in SUFFIXES.values():
                if function := getattr(library, f"{name}_{suffix}", None):
                    function.argtypes = [KINDS.get(k, ctypes.c_void_p) for k in kinds]
        return level, library
    return None
