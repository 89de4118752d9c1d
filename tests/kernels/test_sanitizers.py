"""The compiled kernels under GCC's sanitizers: the tests that compare them with their references find nothing else.

Addresses and undefined behaviour: the instrumented kernels run in Python, whose allocations are watched too.
Data races: they run in a process of their own (tests/proxy/), with OpenMP on threads that ThreadSanitizer knows.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.kernels.cpu import build

ROOT = Path(__file__).parents[2]
PROXY = ROOT / "tests" / "proxy"
TESTS = ["tests/kernels", "tests/engine/test_fused_cpu.py", "tests/engine/test_sampling.py"]
# Left out are tests that measure in child processes, those that call no kernel, and one whose activations are rounded
# to other integers by a kernel that fuses other multiplications and additions.
LEFT_OUT = "peak_memory", "large_pages", "test_build", "test_dtypes", "test_levels", "test_sanitizers", "triton"
WANTED = " and ".join([*(f"not {name}" for name in LEFT_OUT), "not (logits_are and biases and int4)"])

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")]


def instrumented(tmp_path, monkeypatch, level, *flags):
    """The package in a folder of its own, with kernels of one level."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setenv("CXX", " ".join(["g++", "-DRORQUAL_CHECK", *flags]))
    monkeypatch.setattr(build, "OBJECTS", build.OBJECTS.parent / flags[0].partition("=")[2])
    folder = tmp_path / "src" / "rorqual" / "kernels" / "cpu"
    assert build.build(folder, [level]) == [level]
    return folder / f"compiled_{level}.so"


def runtime(name):
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    if not Path(found.stdout.strip()).is_absolute():
        pytest.skip(f"no {name}")
    return found.stdout.strip()


def passes(tmp_path, *arguments, **variables):
    """pytest in a process whose sanitizers write what they find to files, since pytest keeps its standard error."""
    logs = tmp_path / "logs"
    logs.mkdir()
    common = f"log_path={logs / 'found'}"
    for name in ("ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS"):
        variables[name] = ":".join([common, *filter(None, [variables.get(name)])])
    variables |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", WANTED, *arguments, *TESTS]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    found = "\n".join(path.read_text(errors="replace")[:8000] for path in sorted(logs.iterdir()))
    assert run.returncode == 0, f"{run.stdout[-4000:]}\n{found}"


def test_addresses_and_undefined_behaviour(tmp_path, monkeypatch):
    level = build.own_levels(build.find_compiler())[0]
    instrumented(tmp_path, monkeypatch, level, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    # C++'s library too, or the sanitizer would not find what it wraps of it.
    preload = f"{runtime('libasan.so')} {runtime('libstdc++.so')}"
    passes(tmp_path, PYTHONPATH=str(tmp_path / "src"), LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0")


@pytest.mark.skipif(not build.X86, reason="the shared memory lies where ThreadSanitizer allows it on x86-64")
def test_data_races(tmp_path, monkeypatch):
    library = instrumented(tmp_path, monkeypatch, "portable", "-fsanitize=thread")
    host, heap = tmp_path / "host", tmp_path / "heap.so"
    compiler = ["g++", "-std=c++20", "-O2"]
    sources = [PROXY / "host.cpp", PROXY / "openmp.cpp"]
    subprocess.run([*compiler, "-fsanitize=thread", "-rdynamic", *sources, "-o", host], check=True)
    subprocess.run([*compiler, "-shared", "-fPIC", PROXY / "heap.cpp", "-o", heap], check=True)
    passes(
        tmp_path, "-p", "proxy", PYTHONPATH=f"{tmp_path / 'src'}:{PROXY}", LD_PRELOAD=str(heap),
        RORQUAL_PROXY=f"{host} {library}", TSAN_OPTIONS="halt_on_error=1",
    )  # fmt: skip
