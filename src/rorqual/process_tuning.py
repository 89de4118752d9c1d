"""Process-wide settings for CPU training, which the command line makes before torch is imported, and memory release."""

import ctypes
import os
import sys
from collections.abc import Callable

from rorqual.cores import limit_threads

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST = 32 << 20  # glibc's maximal mmap threshold, bytes


def tune() -> None:
    """Call before torch is imported; after that only the malloc setting has an effect.

    GOMP_SPINCOUNT: OpenMP threads that spin long at a barrier starve their peers when another program uses their core.
    A short spin trained 12 % faster on a busy machine and no slower on an idle one.

    malloc thresholds: by default glibc returns freed memory at once, and each page of the next tensor costs a page
    fault. Keeping the memory trained 15 % faster. Other C libraries ignore this.

    Threads: one a physical core, within the CPU quota (cores.py), unless the user has set a number.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    limit_threads()
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_memory() -> None:
    """Return freed memory to the system (malloc_trim); the allocator keeps many small pieces of it."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
