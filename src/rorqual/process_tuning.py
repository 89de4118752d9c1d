"""What concerns the process as a whole: two settings that training on a CPU wants, which the command line makes before
torch is loaded, and memory."""

import ctypes
import os
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST = 32 << 20  # glibc takes no higher threshold


def tune() -> None:
    """Call before torch is imported; later only the second setting has an effect.

    An OpenMP thread that spins long for its peers starves them when another program has their core: a short spin
    trained 12 % faster on a busy machine and no slower on a quiet one.

    The allocator gives freed memory back at once, and every page of the next tensor then costs a fault: keeping it
    trained 15 % faster. Other C libraries ignore this.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_memory() -> None:
    """Give the system back what was freed, many small pieces of which the allocator keeps."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
