"""The compiled functions from Python: which build fits this processor, when it is used, how it is called."""

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.processor import VARIABLE, allows, highest

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
INTERFACE = 19  # as in numbers.h: a build left over from other sources is not used
LEVELS = ("avx512", "avx2", "portable")  # what is built, the best first; also names of processor.py
LACKING = "the processor lacks it"
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
    return _number("dot_products") != 0


@functools.cache
def has_byte_products() -> bool:
    """Whether packed weights are multiplied by the processor's own products of bytes (VNNI)."""
    return _number("byte_products") != 0


@functools.cache
def has_matrix_unit() -> bool:
    """Whether products with weights of 8 bits and a scale an output run on the processor's matrix unit (matrix.h)."""
    return _number("matrix_unit") != 0


class Use(NamedTuple):
    """Of one part: whether it is used, and why or why not."""

    part: str
    used: bool
    why: str


def describe() -> list[Use]:
    """The levels, the instructions beyond them and PyTorch: what is used here, and why not more."""
    parts, level = [], capability()
    for name in LEVELS:
        why = _barrier(name) or _load(name)
        if name == level:
            why = "the best there is"
        elif not isinstance(why, str):
            why = f"{level} is better"
        parts.append(Use(f"compiled functions, {name}", name == level, why))
    has = _processor()
    for part, used, there, of in (
        ("products of bytes (AVX-512 VNNI)", has_byte_products(), has.get("avx512_vnni"), "avx512-vnni"),
        ("products of BF16 numbers (AVX-512 BF16)", has_dot_products(), has.get("avx512_bf16"), "avx512-bf16"),
        ("matrix unit (AMX)", has_matrix_unit(), has.get("amx_tile") and has.get("amx_int8"), "amx"),
    ):
        if used:
            why = "the processor has it"
        elif not there:
            why = LACKING
        elif not allows(of):
            why = f"{VARIABLE}={highest()}"
        else:
            why = "the system does not lend it" if level == "avx512" else "needs the compiled functions, avx512"
        parts.append(Use(part, used, why))
    parts.append(Use(f"PyTorch {torch.__version__}", True, torch.backends.cpu.get_cpu_capability()))
    return parts


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


def _number(name: str) -> int:
    found = _library()
    return 0 if found is None else ctypes.c_int64.in_dll(found[1], name).value


@functools.cache
def _library() -> tuple[str, ctypes.CDLL] | None:
    """The best build that this processor runs. torch is loaded by now, so its OpenMP threads serve both."""
    for level in LEVELS:
        if _barrier(level) is None and not isinstance(library := _load(level), str):
            for name, kinds in SIGNATURES.items():
                for suffix in SUFFIXES.values():
                    if function := getattr(library, f"{name}_{suffix}", None):
                        function.argtypes = [KINDS.get(k, ctypes.c_void_p) for k in kinds]
            return level, library
    return None


def _barrier(level: str) -> str | None:
    """Why a level must not run here, even if it was built."""
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
    """What the processor has, whatever is used of it."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def _load(level: str) -> ctypes.CDLL | str:
    """The build, or why there is none."""
    path = Path(__file__).parent / f"compiled_{level}.so"
    if not path.exists():
        return "not built (no compiler?): run `make` or kernels/cpu/build.py"
    try:
        library = ctypes.CDLL(str(path))
        if ctypes.c_int64.in_dll(library, "interface").value == INTERFACE:
            return library
    except OSError as e:
        return f"does not load here: {e}"
    except ValueError:  # older than the number
        pass
    return f"{path.name} is of other sources: run `make` or kernels/cpu/build.py"
