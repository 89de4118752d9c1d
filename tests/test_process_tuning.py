"""Settings of the process; each test looks at processes of its own, since the settings cannot be taken back."""

import os
import platform
import subprocess
import sys

import pytest

COMMAND = """
import os, sys
from rorqual.cli.entry import main
sys.argv = ["rorqual", "--help"]
try:
    main()
finally:
    print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules)
"""
MEMORY = """
import re
from pathlib import Path
from rorqual.process_tuning import release_memory, tune
held = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
{tune}
before = held()
for _ in range(4):
    block = bytearray(b"x" * (16 << 20))
full = held()
del block
freed = held()
release_memory()
print(full - before, freed - before, held() - before)
"""


def python(code, **environment):
    """The words that a fresh interpreter prints last, without the user's own GOMP_SPINCOUNT."""
    clean = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True)
    return done.stdout.splitlines()[-1].split()


def test_the_command_line_sets_a_short_spin_before_torch_is_loaded():
    spin, torch_was_loaded = python(COMMAND)
    assert 0 < int(spin) < 1_000_000
    assert torch_was_loaded == "False"


def test_a_users_own_spin_stays():
    assert python(COMMAND, GOMP_SPINCOUNT="7")[0] == "7"


@pytest.mark.skipif(sys.platform != "linux" or not platform.libc_ver()[0], reason="glibc's")
def test_freed_memory_is_kept_until_it_is_released():
    full, freed, released = map(int, python(MEMORY.format(tune="")))
    assert full >= 16 > 8 > freed, "without the setting it goes back at once"
    full, freed, released = map(int, python(MEMORY.format(tune="tune()")))
    assert freed >= 16 > 8 > released
