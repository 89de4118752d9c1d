"""The compiled functions (src/rorqual/kernels/cpu): one build for every instruction set, chosen when they run.

Without a C++ compiler the package installs all the same, and the PyTorch reference of each function runs.
"""

import platform

from setuptools import Extension, setup

FOLDER = "src/rorqual/kernels/cpu"
HEADERS = ("numbers", "lanes", "attend", "lowbit", "tile", "team", "network", "cache8", "past8", "matrix")
X86 = {"avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "avx2": ["-march=x86-64-v3"]}
LEVELS = {"portable": []} | (X86 if platform.machine() in ("x86_64", "AMD64") else {})
# No flag here lets the compiler assume that numbers are finite: a NaN must stay one, so that its step is skipped.
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]

setup(
    ext_modules=[
        Extension(
            f"rorqual.kernels.cpu.compiled_{level}",
            [f"{FOLDER}/{name}.cpp" for name in ("rows", "decode", "product", "lowbit", "step")],
            depends=[f"{FOLDER}/{name}.h" for name in HEADERS],
            extra_compile_args=FLAGS + flags,
            extra_link_args=["-fopenmp"],
            optional=True,
        )
        for level, flags in LEVELS.items()
    ]
)
