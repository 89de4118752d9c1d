import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("damaged.py")


@pytest.mark.parametrize("share", [0.04, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_damaged_files_load_or_are_refused(share):
    """In a process of their own: what fails for want of memory there leaves nothing broken for other tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["SHARE_OF_DAMAGES"] = str(share)
    command = [sys.executable, "-m", "pytest", TESTS, "-o", "faulthandler_timeout=120", "-p", "no:cacheprovider"]
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stdout + out.stderr
