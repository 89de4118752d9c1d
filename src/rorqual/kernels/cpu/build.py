"""Compiles this folder's functions, once for every instruction set. setup.py, the Makefile and people run it:

    python src/rorqual/kernels/cpu/build.py [LEVEL …]

Without a level it makes the machine's best and the one that runs everywhere; `all`: every level that the machine runs.
It needs Python alone, so that it can run before PyTorch is there. Objects are kept by what they are made of, in
`build/kernels` of the checkout: what did not change is not compiled again.
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
# -O2 and no unrolling (lowbit.cpp) at the level that every processor runs: a quarter of the time to compile, or less.
LEVELS = {"portable": ["-O2"]}
if X86:
    LEVELS["avx2"] = ["-O3", "-march=x86-64-v3"]
    LEVELS["avx512"] = ["-O3", "-march=x86-64-v4", "-mprefer-vector-width=512"]
# No flag here lets the compiler assume that numbers are finite: a NaN must stay one, so that its step is skipped.
# Debug information doubles the time; that vectors of 64 bytes are passed differently at each level concerns nobody.
FLAGS = [
    "-std=c++20", "-g0", "-fPIC", "-fwrapv", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-Wall", "-Wno-psabi",
]  # fmt: skip
# Longest first, with seconds that one core takes (AMD Milan, GCC 12).
SECONDS = {
    "step": {"portable": 10, "avx2": 28, "avx512": 28},
    "lowbit": {"portable": 6, "avx2": 20, "avx512": 40},
    "decode": {"portable": 6, "avx2": 13, "avx512": 13},
    "rows": {"portable": 2, "avx2": 4, "avx512": 4},
    "product": {"portable": 1, "avx2": 1, "avx512": 3},
}
SLOWER = "plain PyTorch runs instead, several times slower, and packed weights not at all fast"


class Failed(Exception):
    """No build: one sentence says why."""


def build(folder: Path, levels: list[str] | None = None) -> list[str]:
    """Compile these levels (see above) into `folder`; say what happens; return what was built.

    Whatever fails is told in a sentence and leaves the rest as it is: every function has a reference in PyTorch.
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
    """The levels that this processor runs, the best first."""
    if not X86:
        return ["portable"]
    found = _run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull])
    macros = set(re.findall(r"#define __(\w+)__ ", found.stdout))
    if {"AVX512F", "AVX512BW", "AVX512CD", "AVX512DQ", "AVX512VL"} <= macros:
        return ["avx512", "avx2", "portable"]
    return ["avx2", "portable"] if {"AVX2", "FMA", "BMI2", "F16C", "LZCNT"} <= macros else ["portable"]


def _build(folder: Path, levels: list[str], compiler: list[str]) -> list[str]:
    version = _run([*compiler, "--version"]).stdout
    objects = {(level, name): _object(level, name, compiler, version) for name in SECONDS for level in levels}
    missing = [key for key, path in objects.items() if not path.exists()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if missing:
        work = [SECONDS[name][level] for level, name in missing]
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
        result = _run([*compiler, *FLAGS, *LEVELS[level], "-c", str(HERE / f"{name}.cpp"), "-o", str(part)])
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
        part = folder / f".compiled_{level}.{os.getpid()}"  # replaced in one go: it may be in use
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        command = [*compiler, *shared, "-fopenmp", *(str(objects[level, name]) for name in SECONDS), "-o", str(part)]
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
    digest = hashlib.sha256(repr((compiler, version, FLAGS, LEVELS[level])).encode())
    for part in sorted(_parts(HERE / f"{name}.cpp")):
        digest.update(part.read_bytes())
    return OBJECTS / f"{level}-{name}-{digest.hexdigest()[:16]}.o"


def _parts(path: Path) -> set[Path]:
    """A source and what it includes of this folder."""
    found, waiting = set(), [path]
    while waiting:
        here = waiting.pop()
        if here not in found:
            found.add(here)
            waiting += [HERE / name for name in re.findall(r'^ *#include "([^"]+)"', here.read_text(), re.MULTILINE)]
    return found


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as e:
        raise Failed(f"{command[0]}: {e.strerror}") from e


if __name__ == "__main__":
    unknown = [level for level in sys.argv[1:] if level not in LEVELS and sys.argv[1:] != ["all"]]
    if not (HERE / "step.cpp").exists():
        sys.exit("kernels: their sources are in Rorqual's repository; a wheel carries them compiled")
    if unknown:
        sys.exit(f"kernels: {unknown[0]}: no level of this processor's family; there are {', '.join(LEVELS)}")
    built = build(HERE, sys.argv[1:])
    if built:
        print(f"kernels: ready for {' and '.join(built)}", flush=True)
