"""Large pages: what lies in them stays what it was, and they come where Linux gives them."""

import ctypes
import mmap
import sys
from pathlib import Path

import pytest
import torch

from rorqual.kernels.huge_pages import HUGE_PAGE, MADV_COLLAPSE, use_huge_pages

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or mmap.PAGESIZE != 4096, reason="large pages of 2 MB are asked of Linux"
)


@pytest.fixture(autouse=True)
def collapses():
    """Skips where Linux does not know the request (before 6.1, or built without it)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = -(-torch.zeros(4096).data_ptr() // 4096) * 4096
    if libc.madvise(page, 0, MADV_COLLAPSE) and ctypes.get_errno() == 22:
        pytest.skip("this Linux does not know the request")


def large(smaps: str) -> int:
    """KB in large pages, by a mapping's entry in /proc/self/smaps or by the sum of them."""
    return next(int(line.split()[1]) for line in smaps.splitlines() if line.startswith("AnonHugePages"))


def mapping(address: int) -> str:
    """The entry in /proc/self/smaps of the mapping that holds an address, without its first line."""
    inside = False
    found = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            start, _, end = first.partition("-")
            inside = int(start, 16) <= address < int(end, 16)
        elif inside:
            found.append(line)
    return "\n".join(found)


def test_tensors_side_by_side_lie_in_large_pages_afterwards():
    tensors = [torch.randint(0, 256, (300_000,), dtype=torch.uint8) for _ in range(60)]
    copies = [t.clone() for t in tensors]
    rollup = Path("/proc/self/smaps_rollup")
    before = large(rollup.read_text())
    use_huge_pages(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    assert large(rollup.read_text()) - before >= 2 * HUGE_PAGE // 1024


def test_only_pages_at_least_half_full_of_tensors_become_large():
    memory = mmap.mmap(-1, 4 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(bytes(4 * HUGE_PAGE))
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    pages = whole[-whole.data_ptr() % HUGE_PAGE :][: 3 * HUGE_PAGE].view(3, HUGE_PAGE)
    little, some, more = (
        pages[0, : HUGE_PAGE // 2 - 1],
        pages[1, 1000 : 1000 + HUGE_PAGE // 4],
        pages[1, HUGE_PAGE // 2 :],
    )
    if "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("Linux puts all memory into large pages by itself")
    use_huge_pages([])
    use_huge_pages([little, some])
    assert large(mapping(whole.data_ptr())) == 0
    use_huge_pages([little, some, more])
    assert large(mapping(whole.data_ptr())) == HUGE_PAGE // 1024
    assert not whole.any()
