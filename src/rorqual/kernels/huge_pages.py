"""Weights in huge pages, on Linux."""

import ctypes
import mmap
import sys
from collections import Counter
from collections.abc import Iterable

from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes
MADV_COLLAPSE = 25  # since Linux 6.1


def use_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Move CPU memory that is at least half full of these tensors to pages of 2 MB; no effect where Linux refuses.

    A decode step reads all weights, and page table walks of 4 KB pages made steps of one sequence and of 32 take 8 to
    9 % longer (SmolLM2, in a virtual machine).
    """
    if sys.platform != "linux" or mmap.PAGESIZE != 4096:  # with pages of 16 or 64 KB, huge ones have 32 or 512 MB
        return
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    filled: Counter[int] = Counter()
    for tensor in tensors:
        start = tensor.data_ptr()
        end = start + tensor.nbytes
        if tensor.is_cpu:
            for page in range(start // HUGE_PAGE, -(-end // HUGE_PAGE)):
                filled[page] += min(end, (page + 1) * HUGE_PAGE) - max(start, page * HUGE_PAGE)
    for page, size in filled.items():
        if size >= HUGE_PAGE // 2:
            libc.madvise(page * HUGE_PAGE, HUGE_PAGE, MADV_COLLAPSE)
