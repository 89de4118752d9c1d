"""Python bindings of the compiled CPU kernels: which build this processor runs, when it is used, how it is called."""

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.kernels.dtype_names import KERNEL_SUFFIXES
from rorqual.processor import VARIABLE, allows, highest

INTERFACE = 30  # as in csrc/dtypes.h: a build of other sources is not used
LEVELS = ("avx512", "avx2", "portable")  # the builds, best first; also names in processor.py
LACKING = "the processor lacks it"

# Kinds of arguments. Tensors are passed as addresses.
T = "tensor of the call's dtype"
F32, I64, I32, U8, BOOL = "float32 tensor", "int64 tensor", "int32 tensor", "uint8 tensor", "bool tensor"
INT, FLOAT = "int64", "float"
DTYPES = {F32: torch.float32, U8: torch.uint8, I64: torch.int64, I32: torch.int32, BOOL: torch.bool}  # T: the call's
CONTIGUOUS = frozenset((F32, I64, I32, U8))  # T and BOOL: in their last dimension only
CTYPES = {INT: ctypes.c_int64, FLOAT: ctypes.c_float}  # tensors: void *

# The arguments of each function, in order; their names are those of the C++ function in csrc/.
SIGNATURES = {
    # elementwise.cpp
    "softmax_grad": (T, INT, INT, I64, F32, FLOAT, F32, F32),
    "rms_norm": (T, INT, F32, INT, INT, FLOAT, T, F32),
    "rms_norm_backward": (T, INT, T, INT, F32, F32, INT, INT, T, F32, INT),
    "swiglu": (T, INT, T, INT, F32, INT, INT, T),
    "swiglu_backward": (T, INT, T, INT, T, INT, F32, INT, INT, T, INT, T, INT, F32),
    "unpermute": (T, I64, INT, INT, INT, T),
    "masked_softmax": (T, INT, INT, BOOL, INT, INT, INT, INT, FLOAT),
    "masked_softmax_backward": (T, T, INT, INT, FLOAT),
    "apply_rotary": (T, INT, INT, INT, INT, T, T, INT, INT, INT, INT, FLOAT, T, INT, INT),
    "accumulate": (F32, T, INT),
    # block_scaled.cpp: a matrix and its tiles; scales, element; what is wanted
    "tile_amax": (T, INT, INT, INT, I32, INT, INT, INT, F32),
    "round_tiles": (T, INT, INT, INT, I32, INT, INT, INT, F32, INT, INT, INT, FLOAT, INT, F32, U8),
    "decode_tiles": (U8, INT, INT, I32, INT, INT, INT, F32, INT, INT, INT, INT, T),
    # best_scale.cpp, in FP32 only
    "best_scale": (F32, F32, INT, INT, F32),
    # adamw.cpp: `adamw` in BF16 only, which is the moments' dtype; `adamw_8bit` in FP32 only, which is the weights'
    "adamw": (F32, F32, T, T, INT, INT, *[FLOAT] * 6),
    "adamw_8bit": (F32, F32, U8, U8, F32, F32, F32, F32, INT, *[FLOAT] * 6),
    # paged_attention.cpp: q, q2; k, k2 and v, each with its distances; block tables; sizes
    "paged_attention": (
        T, T, T, INT, INT, INT, T, INT, INT, T, INT, INT, INT, I32, INT, INT, I32, INT, INT, INT, INT, INT, INT, FLOAT,
        T,
    ),
    # q, q2; k, k2 and v, FP8; block tables; sizes
    "paged_attention_fp8": (T, T, U8, U8, U8, I32, INT, INT, I32, INT, INT, INT, INT, INT, FLOAT, T),
    "store_fp8": (T, INT, INT, INT, I64, U8),
    # masked_attention.cpp, in FP32 only: q, k, v; mask and its distances; sizes
    "masked_attention": (T, T, T, BOOL, *[INT] * 9, FLOAT, F32, F32),
    "masked_attention_backward": (T, T, T, BOOL, *[INT] * 9, FLOAT, F32, F32, F32, F32, F32, F32),
    # sampling.cpp
    "sample": (T, INT, INT, FLOAT, FLOAT, INT, FLOAT, F32, I64, F32),
    "append_tokens": (T, INT, INT, I64, I64, I64, I64),
    # bf16_gemm.cpp: only where has_dot_products(); the first also in FP32, in f32_gemm.cpp
    "grouped_gemm": (T, INT, T, T, I32, INT, INT, INT, T),
    "grouped_gemm_backward_input": (T, INT, T, I32, INT, INT, INT, T),
    "grouped_gemm_backward_weight": (T, INT, T, INT, I32, INT, INT, INT, F32, T),
    # qgemm.cpp
    "quantized_linear": (T, INT, U8, INT, F32, T, I32, INT, INT, INT, U8, T),
    # exact_gemm.cpp: x, w (strides of rows or n, k and groups), bias, ends; FP32 only, as the following
    "exact_gemm": (T, INT, INT, T, INT, INT, INT, F32, I32, INT, INT, INT, INT, T, INT, INT),
    # exact_attention.cpp: q; k, k2 and v; block tables; mask; sizes
    "exact_attention": (
        F32, T, INT, INT, INT, T, INT, INT, T, INT, INT, INT, I32, INT, INT, I32, BOOL, *[INT] * 7, FLOAT, F32,
    ),
    # exact_rows.cpp
    "exact_rms_norm": (T, INT, F32, INT, INT, FLOAT, F32, F32),
    "exact_swiglu": (T, INT, T, INT, F32, INT, INT, F32),
    "exact_sigmoid": (F32, INT, F32),
    "exact_softmax": (F32, INT, INT, F32),
    "exact_rotary": (T, INT, INT, INT, INT, F32, F32, INT, INT, INT, INT, F32),
    "exact_logprobs": (F32, INT, INT, I64, F32, F32),
    # fused_decode.cpp
    "fused_decode": (I64, I64, F32, INT, I32, INT, INT, I32, F32, F32, I32, INT, F32),
}  # fmt: skip


def capability() -> str | None:
    """The level of the build in use: avx512, avx2 or portable; None: no build, the PyTorch references run."""
    found = _library()
    return None if found is None else found[0]


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled kernels take these tensors, all of one dtype; else the caller runs its reference.

    Under torch.compile the reference runs too, since the compiler can fuse it with its surroundings.
    """
    first = tensors[0].dtype
    if first not in KERNEL_SUFFIXES or torch.compiler.is_compiling() or _library() is None:
        return False
    # A list: this runs ten times a layer, and a generator takes three times as long.
    return all([t.is_cpu and t.dtype is first and t.stride(-1) == 1 for t in tensors])  # noqa: C419


@functools.cache
def has_dot_products() -> bool:
    """Whether BF16 dot products (AVX-512 BF16) are in use."""
    return _number("has_bf16_dot") != 0


@functools.cache
def has_byte_products() -> bool:
    """Whether quantised weights use int8 dot products (AVX-512 VNNI)."""
    return _number("has_vnni") != 0


@functools.cache
def has_matrix_unit() -> bool:
    """Whether int8 weights with a scale per output run on AMX (csrc/amx.h)."""
    return _number("has_amx") != 0


class Use(NamedTuple):
    """Whether a level or an instruction set is used, and why or why not."""

    part: str
    used: bool
    why: str


def describe() -> list[Use]:
    """The levels, the instruction sets beyond them and PyTorch: what is used on this machine, and why not more."""
    parts: list[Use] = []
    level = capability()
    for name in LEVELS:
        why = _excluded(name) or _load(name)
        if name == level:
            why = "the best level that runs here"
        elif not isinstance(why, str):
            why = f"{level} is better"
        parts.append(Use(f"compiled functions, {name}", name == level, why))
    has = _processor()
    for part, used, there, of in (
        ("int8 dot products (AVX-512 VNNI)", has_byte_products(), has.get("avx512_vnni"), "avx512-vnni"),
        ("BF16 dot products (AVX-512 BF16)", has_dot_products(), has.get("avx512_bf16"), "avx512-bf16"),
        ("matrix unit (AMX)", has_matrix_unit(), has.get("amx_tile") and has.get("amx_int8"), "amx"),
    ):
        if used:
            why = "the processor has it"
        elif not there:
            why = LACKING
        elif not allows(of):
            why = f"{VARIABLE}={highest()}"
        else:
            why = "the system does not grant it" if level == "avx512" else "needs the compiled functions, avx512"
        parts.append(Use(part, used, why))
    parts.append(Use(f"PyTorch {torch.__version__}", True, torch.backends.cpu.get_cpu_capability()))
    return parts


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Run a compiled function, in its form for `dtype`; tensors are passed as addresses, None as a null pointer.

    Raises TypeError for a tensor it would misread: one that is not on the CPU, has another dtype, or is not contiguous
    (of `dtype` and bool: in its last dimension); ValueError for a wrong number of arguments.
    """
    values: list[int | float | None] = []
    for kind, value in zip(SIGNATURES[name], arguments, strict=True):
        if isinstance(value, Tensor):
            contiguous = value.is_contiguous() if kind in CONTIGUOUS else value.stride(-1) == 1 or value.shape[-1] < 2
            if not value.is_cpu or value.dtype is not DTYPES.get(kind, dtype) or not contiguous:
                found = f"{value.dtype} on {value.device}, strides {value.stride()}"
                raise TypeError(f"{name}: argument {len(values)} is {found}")
            values.append(value.data_ptr())
        else:
            values.append(value)
    library = _library()
    assert library is not None
    getattr(library[1], f"{name}_{KERNEL_SUFFIXES[dtype]}")(*values)


def rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., W] as rows at a constant stride: x or a contiguous copy, and the stride."""
    even = all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.ndim - 2))
    if x.ndim > 1 and even and x.stride(-1) == 1:
        return x, x.stride(-2)
    return x.contiguous(), x.shape[-1]


def _number(name: str) -> int:
    found = _library()
    return 0 if found is None else ctypes.c_int64.in_dll(found[1], name).value


@functools.cache
def _library() -> tuple[str, ctypes.CDLL] | None:
    """The best build this processor runs. torch is loaded already, so both share its OpenMP runtime."""
    for level in LEVELS:
        if _excluded(level) is None and not isinstance(library := _load(level), str):
            for name, kinds in SIGNATURES.items():
                for suffix in KERNEL_SUFFIXES.values():
                    if function := getattr(library, f"{name}_{suffix}", None):
                        function.argtypes = [CTYPES.get(kind, ctypes.c_void_p) for kind in kinds]
            return level, library
    return None


def _excluded(level: str) -> str | None:
    """Why a level cannot run here, even if it was built; None: it can."""
    if not allows(level):
        return f"{VARIABLE}={highest()}"
    if level == "portable":
        return None
    capability = torch.backends.cpu.get_cpu_capability()  # ATEN_CPU_CAPABILITY can lower it
    if LEVELS.index(level) >= LEVELS.index({"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "portable")):
        return None
    there = _processor().get({"avx2": "avx2", "avx512": "avx512_f"}[level])
    return f"ATEN_CPU_CAPABILITY lowers PyTorch to {capability}" if there else LACKING


def _processor() -> dict[str, bool]:
    """What the processor has, whether or not it is used."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def _load(level: str) -> ctypes.CDLL | str:
    """A level's build, or why there is none."""
    path = Path(__file__).parent / f"compiled_{level}.so"
    if not path.exists():
        return "not built (no compiler?): run `make` or kernels/cpu/build.py"
    try:
        library = ctypes.CDLL(str(path))
        if ctypes.c_int64.in_dll(library, "interface").value == INTERFACE:
            return library
    except OSError as e:
        return f"does not load here: {e}"
    except ValueError:  # from before there was a number
        pass
    return f"{path.name} is of other sources: run `make` or kernels/cpu/build.py"
