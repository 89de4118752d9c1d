"""Measure and describe this machine."""

import functools
import platform
import time
from importlib.metadata import version
from typing import Any

import psutil
import torch

from rorqual.cores import Cores, find_cores, usable_cores
from rorqual.kernels import cpu
from rorqual.kernels.dtypes import bf16_speed, dtype_name, fastest_dtype

SIZE = {"cpu": 1024, "cuda": 8192}  # of the measured matmul
EMULATED = 256  # on a CPU that emulates the dtype: 1024 would take five seconds
MEASURE_SECONDS = 0.3


def matrix_peak(dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """FLOP/s of a large square matmul, measured once per process, dtype and thread count."""
    return _measured_peak(dtype, device, torch.get_num_threads())


@functools.cache
def _measured_peak(dtype: torch.dtype, device: str, threads: int) -> float:
    size = SIZE.get(torch.device(device).type, 4096)
    if dtype is torch.bfloat16 and fastest_dtype(device) is not dtype:
        size = EMULATED
    a = torch.ones(size, size, dtype=dtype, device=device)
    out = a @ a
    best, start = float("inf"), time.perf_counter()
    # The best of many: other work on the machine can only slow it down.
    while time.perf_counter() - start < MEASURE_SECONDS:
        before = time.perf_counter()
        torch.mm(a, a, out=out)
        if out.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best


def memory_used(device: str = "cpu") -> int:
    """Resident bytes of this process; on a GPU, its peak allocation there."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def memory_total(device: torch.device | str = "cpu") -> int:
    """Memory of the device in bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def gpu_name(device: torch.device | str) -> str:
    """What its driver calls a GPU."""
    return torch.cuda.get_device_name(device)


@functools.cache
def describe_machine() -> dict[str, Any]:
    """Processor, cores in use, memory and versions, for ledgers and benchmarks."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "compiled_functions": cpu.capability(),  # of rorqual.kernels.cpu; None: the PyTorch references are used
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def diagnose() -> list[tuple[str, str]]:
    """(part, sentence) pairs: what is used on this machine, and why."""
    machine = describe_machine()
    dtype = fastest_dtype()
    times = bf16_speed()
    compared = f"a BF16 matmul takes {1 / times:.1f} times as long as an FP32 one" if times < 1 else (
        f"a BF16 matmul is {times:.1f} times as fast as an FP32 one")  # fmt: skip
    return [
        ("processor", f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB"),
        ("threads", _threads(find_cores(), machine["threads"])),
        *((use.part, f"{'in use' if use.used else 'not used'}: {use.why}") for use in cpu.describe()),
        ("dtype auto", f"{dtype_name(dtype)}: {compared}"),
        ("accelerator", machine["accelerator"] or "none that PyTorch finds"),
        ("versions", f"rorqual {version('rorqual')}, torch {machine['torch']}, Python {machine['python']}"),
    ]


def _threads(cores: Cores, threads: int) -> str:
    said = f"{threads}, on {cores.physical} physical cores with {cores.hardware_threads} hardware threads"
    if cores.quota is not None:
        said += f"; the control group's quota is {cores.quota:g} CPUs"
    if cores.numa_nodes > 1:
        said += (
            f"; {cores.numa_nodes} NUMA nodes: a process on one of them (numactl --cpunodebind=0 --membind=0) reads no "
            "memory of the others"
        )
    return said


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
