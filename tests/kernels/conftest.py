"""Where nothing is compiled, most functions of kernels/ are their references, and comparing the two shows nothing."""

import shutil
import sys

import pytest

from rorqual.kernels import cpu
from rorqual.processor import VARIABLE, highest


@pytest.fixture(autouse=True, scope="session")
def built_where_there_is_a_compiler():
    """Fails every test of this folder where the kernels could be compiled and are not."""
    could = sys.platform == "linux" and shutil.which("g++") and highest() != "none"
    if could and cpu.capability() is None:
        pytest.fail(f"no compiled kernels, though there is a compiler and {VARIABLE} is not none: run `make`")


@pytest.fixture(scope="session")
def compiled():
    """Skips a test that would compare a reference with itself."""
    if cpu.capability() is None:
        pytest.skip("no compiled kernels: the function is its own reference")
