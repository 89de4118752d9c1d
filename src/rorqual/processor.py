"""The instruction sets to use: all that the processor has, or fewer by RORQUAL_CPU.

The classes are ordered, and each includes those before it; RORQUAL_CPU can only lower the class.
kernels/cpu/csrc/cpu_class.h has the same names for C++.
"""

import os
import platform
import sys
import warnings

from rorqual.errors import UserError

VARIABLE = "RORQUAL_CPU"
CLASSES = ("none", "portable", "avx2", "avx512", "avx512-vnni", "avx512-bf16", "amx")
# Settings of oneDNN and MKL (on Intel processors) that limit them to a class.
ONEDNN = {
    "none": "SSE41", "portable": "SSE41", "avx2": "AVX2", "avx512": "AVX512_CORE", "avx512-vnni": "AVX512_CORE_VNNI",
    "avx512-bf16": "AVX512_CORE_BF16",
}  # fmt: skip
MKL = {
    "none": "SSE4_2", "portable": "SSE4_2", "avx2": "AVX2", "avx512": "AVX512", "avx512-vnni": "AVX512_E1",
    "avx512-bf16": "AVX512_E3",
}  # fmt: skip


def highest() -> str:
    """The class in RORQUAL_CPU, else the highest. Raises UserError for an unknown one."""
    name = os.environ.get(VARIABLE) or CLASSES[-1]
    if name not in CLASSES:
        raise UserError(f"{VARIABLE}={name}: not a processor class; use one of {', '.join(CLASSES)}")
    return name


def allows(name: str) -> bool:
    """Whether RORQUAL_CPU, if set, permits the class `name`, whatever the processor has."""
    return CLASSES.index(name) <= CLASSES.index(highest())


def lower_torch() -> None:
    """Apply RORQUAL_CPU to PyTorch too, unless its own variables are set. Call before torch is imported.

    An unknown class is left to `highest`, whose error the command line prints.
    """
    name = os.environ.get(VARIABLE)
    if name not in ONEDNN:
        return
    wanted = {}
    if name in ("none", "portable"):
        wanted["ATEN_CPU_CAPABILITY"] = "default"
    elif name == "avx2" and _has_avx512():  # without AVX-512 PyTorch would assume AVX2
        wanted["ATEN_CPU_CAPABILITY"] = "avx2"
    if platform.machine() in ("x86_64", "AMD64"):
        if "DNNL_MAX_CPU_ISA" not in os.environ:  # the older name of the next
            wanted["ONEDNN_MAX_CPU_ISA"] = ONEDNN[name]
        wanted["MKL_ENABLE_INSTRUCTIONS"] = MKL[name]
    new = {key: value for key, value in wanted.items() if key not in os.environ}
    if new and "torch" in sys.modules:
        warnings.warn(
            f"{VARIABLE}={name}: torch was imported before rorqual and keeps the processor's own instructions; "
            "import rorqual first",
            stacklevel=3,
        )
    os.environ.update(new)


def _has_avx512() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return any(line.startswith("flags") and " avx512f " in line for line in file)
    except OSError:
        return False
