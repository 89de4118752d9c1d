"""Large pages: what lies in them stays what it was, and they come where Linux gives them."""

import ctypes
import mmap
import sys
from pathlib import Path

import pytest
import torch

from rorqual.kernels.huge_pages import HUGE_PAGE, MADV_COLLAPSE, use_huge_pages


def large() -> int:
    """KB of this process in large pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


@pytest.mark.skipif(sys.platform != "linux" or mmap.PAGESIZE != 4096, reason="large pages of 2 MB are asked of Linux")
def test_tensors_side_by_side_lie_in_large_pages_afterwards():
    tensors = [torch.randint(0, 256, (300_000,), dtype=torch.uint8) for _ in range(60)]
    copies = [t.clone() for t in tensors]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = -(-tensors[0].data_ptr() // 4096) * 4096
    if libc.madvise(page, 0, MADV_COLLAPSE) and ctypes.get_errno() == 22:
        pytest.skip("this Linux does not know the request")
    before = large()
    use_huge_pages(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    assert large() - before >= 2 * HUGE_PAGE // 1024


def test_little_memory_is_left_alone():
    use_huge_pages([])
    some = torch.arange(1000)
    use_huge_pages([some])
    assert torch.equal(some, torch.arange(1000))
