"""Compiles the CPU kernels in csrc/, once for every instruction set. setup.py, the Makefile and people run it:

    python src/rorqual/kernels/cpu/build.py [LEVEL …]

Without a level it builds the machine's best and `portable`; `all`: every level the machine runs. It needs only Python,
so it can run before PyTorch is installed. Objects are cached by a hash of their sources and flags in `build/kernels` of
the checkout, so what did not change is not compiled again. CXX names the compiler; with CXX="g++ -DRORQUAL_CHECK" the
kernels check indices and buffer bounds as they run.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
OBJECTS = HERE.parents[3] / "build" / "kernels"
X86 = platform.machine() in ("x86_64", "AMD64")
# portable: -O2 and no unrolling (qgemm.cpp) take at most a quarter of the compile time.
LEVELS = {"portable": ["-O2"]}
if X86:
    LEVELS["avx2"] = ["-O3", "-march=x86-64-v3"]
    LEVELS["avx512"] = ["-O3", "-march=x86-64-v4", "-mprefer-vector-width=512"]
# No -ffast-math: a NaN must stay one, so that training skips its step. Debug information doubles the compile time.
# -Wno-psabi: 64-byte vectors are passed differently at each level, but never across libraries.
FLAGS = [
    "-std=c++20", "-g0", "-fPIC", "-fwrapv", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-Wall", "-Wno-psabi",
]  # fmt: skip
# The sources in csrc/, longest first, with the seconds one core takes (AMD Milan, GCC 12).
SOURCES = {
    "fused_decode": {"portable": 10, "avx2": 28, "avx512": 28},
    "qgemm": {"portable": 6, "avx2": 20, "avx512": 40},
    "paged_attention": {"portable": 15, "avx2": 24, "avx512": 24},
    "exact_attention": {"portable": 5, "avx2": 7, "avx512": 8},
    "masked_attention": {"portable": 2, "avx2": 2, "avx512": 3},
    "exact_gemm": {"portable": 2, "avx2": 5, "avx512": 6},
    "exact_rows": {"portable": 2, "avx2": 5, "avx512": 5},
    "sampling": {"portable": 1, "avx2": 3, "avx512": 3},
    "elementwise": {"portable": 2, "avx2": 4, "avx512": 4},
    "block_scaled": {"portable": 1, "avx2": 3, "avx512": 3},
    "best_scale": {"portable": 1, "avx2": 1, "avx512": 1},
    "adamw": {"portable": 1, "avx2": 1, "avx512": 1},
    "bf16_gemm": {"portable": 1, "avx2": 1, "avx512": 3},
    "f32_gemm": {"portable": 1, "avx2": 1, "avx512": 2},
}
# Fused multiply-adds only where a source asks for them: the same bits on every level (csrc/exact_math.h).
EXACT = ["-ffp-contract=off"]
SLOWER = "plain PyTorch runs instead, several times slower, and far slower with quantised weights"


class Failed(Exception):
    """No build; the message says why in one sentence."""


def build(folder: Path, levels: list[str] | None = None) -> list[str]:
    """Compile `levels` (see above) into `folder`, print the progress, and return the levels that were built.

    A failure prints one sentence and leaves the rest as it is, since every function has a reference in PyTorch.
    """
    try:
        compiler = find_compiler()
        if not levels or levels == ["all"]:
            own = own_levels(compiler)
            levels = [own[0], own[-1]] if not levels else own
        return _build(folder, list(dict.fromkeys(levels)), compiler)
    except Failed as e:
        print(f"kernels: {e}: {SLOWER}; install g++ 11 or newer and run this again", flush=True)
        return []


def find_compiler() -> list[str]:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        command = shlex.split(name or "")
        if command and shutil.which(command[0]):
            return command
    raise Failed("no C++ compiler")


def own_levels(compiler: list[str]) -> list[str]:
    """The levels this processor runs, best first."""
    if not X86:
        return ["portable"]
    found = _run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull])
    macros = set(re.findall(r"#define __(\w+)__ ", found.stdout))
    if {"AVX512F", "AVX512BW", "AVX512CD", "AVX512DQ", "AVX512VL"} <= macros:
        return ["avx512", "avx2", "portable"]
    return ["avx2", "portable"] if {"AVX2", "FMA", "BMI2", "F16C", "LZCNT"} <= macros else ["portable"]


def _build(folder: Path, levels: list[str], compiler: list[str]) -> list[str]:
    version = _run([*compiler, "--version"]).stdout
    objects = {(level, name): _object(level, name, compiler, version) for name in SOURCES for level in levels}
    missing = [key for key, path in objects.items() if not path.exists()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if missing:
        work = [SOURCES[name][level] for level, name in missing]
        seconds = max(max(work), sum(work) / cores)
        files = f"{len(missing)} files for {' and '.join(levels)}"
        print(f"kernels: compiling {files}, about {seconds:.0f} s on {cores} cores", flush=True)
    errors: dict[str, str] = {}
    done: list[float] = []
    counting = threading.Lock()

    def compile_one(key: tuple[str, str]) -> None:
        level, name = key
        if level in errors:
            return
        start, to = time.monotonic(), objects[key]
        to.parent.mkdir(parents=True, exist_ok=True)
        part = to.with_suffix(f".{os.getpid()}")
        result = _run([*compiler, *_flags(level, name), "-c", str(_source(name)), "-o", str(part)])
        with counting:
            if result.returncode:
                lines = result.stderr.splitlines()
                errors[level] = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
                return
            for old in to.parent.glob(f"{level}-{name}-*.o"):
                old.unlink()
            part.replace(to)
            done.append(time.monotonic() - start)
            print(f"kernels: {len(done)}/{len(missing)} {name}.cpp for {level}: {done[-1]:.0f} s", flush=True)

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(compile_one, missing))
    built = [level for level in levels if level not in errors]
    for level in built:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".compiled_{level}.{os.getpid()}"  # replaced atomically, since it may be in use
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        command = [*compiler, *shared, "-fopenmp", *(str(objects[level, name]) for name in SOURCES), "-o", str(part)]
        result = _run(command)
        if result.returncode:
            part.unlink(missing_ok=True)
            errors[level] = (result.stderr.splitlines() or ["no message"])[-1]
            continue
        part.replace(folder / f"compiled_{level}.so")
    if errors:
        level, error = next(iter(errors.items()))
        if len(errors) == len(levels):
            raise Failed(f"{compiler[0]} failed ({error.strip()})")
        print(f"kernels: {level}: {compiler[0]} failed ({error.strip()}); a lower level runs instead", flush=True)
    return [level for level in levels if level not in errors]


def _object(level: str, name: str, compiler: list[str], version: str) -> Path:
    digest = hashlib.sha256(repr((compiler, version, _flags(level, name))).encode())
    for part in sorted(_dependencies(_source(name))):
        digest.update(part.read_bytes())
    return OBJECTS / f"{level}-{name}-{digest.hexdigest()[:16]}.o"


def _flags(level: str, name: str) -> list[str]:
    return [*FLAGS, *LEVELS[level], *(EXACT if name.startswith("exact_") else [])]


def _source(name: str) -> Path:
    return HERE / "csrc" / f"{name}.cpp"


def _dependencies(path: Path) -> set[Path]:
    """A source and the files of csrc/ it includes, directly or not."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        here = waiting.pop()
        if here not in found:
            found.add(here)
            names = re.findall(r'^ *#include "([^"]+)"', here.read_text(), re.MULTILINE)
            waiting += [(here.parent / name).resolve() for name in names]
    return found


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as e:
        raise Failed(f"{command[0]}: {e.strerror}") from e


if __name__ == "__main__":
    unknown = [level for level in sys.argv[1:] if level not in LEVELS and sys.argv[1:] != ["all"]]
    if not _source("fused_decode").exists():
        sys.exit("kernels: no sources here; they are in Rorqual's repository")
    if unknown:
        sys.exit(f"kernels: {unknown[0]}: no such level for this processor family; there are {', '.join(LEVELS)}")
    built = build(HERE, sys.argv[1:])
    if built:
        print(f"kernels: ready for {' and '.join(built)}", flush=True)
