"""Physical cores and quotas, from files as Linux has them."""

import os
import subprocess
import sys

import pytest

from rorqual.cores import find_cores

PRINT = """
import os
import rorqual.cores as cores
cores.find_cores = lambda: cores.Cores(hardware_threads=8, physical=4, quota=3.5, numa_nodes=1)
from rorqual.process_tuning import tune
tune()
print(os.environ.get("OMP_NUM_THREADS"), cores.threads_asked_for())
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Two sockets of two cores with two hardware threads each; the process may run on all but the last."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    for n in range(8):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{n}"
        (folder / "topology").mkdir(parents=True)
        (folder / f"node{n % 4 // 2}").mkdir()
        (folder / "topology/thread_siblings_list").write_text(f"{n % 4},{n % 4 + 4}\n")
    return tmp_path


def test_hardware_threads_of_a_core_count_once(machine):
    found = find_cores(machine)
    assert (found.hardware_threads, found.physical, found.numa_nodes) == (7, 4, 2)
    assert found.quota is None
    assert found.usable == 4


@pytest.mark.parametrize(
    ("cgroup", "files", "quota", "usable"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, None, 4),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "250000 100000\n"}, 2.5, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5, 1),
        ("0::/\n", {"cpu.max": "900000 100000\n"}, 9.0, 4),
        ("4:memory:/x\n1:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"}, 3.0, 3),
        ("1:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, None, 4),
        ("1:cpu:/not/here\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1.0, 1),
    ],
)
def test_the_quota_of_a_control_group_and_of_those_around_it(machine, cgroup, files, quota, usable):
    for path, text in {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{p}": t for p, t in files.items()}}.items():
        (machine / path).parent.mkdir(parents=True, exist_ok=True)
        (machine / path).write_text(text)
    found = find_cores(machine)
    assert (found.quota, found.usable) == (quota, usable)


def test_without_the_files_every_hardware_thread_counts(tmp_path):
    found = find_cores(tmp_path)
    assert found.usable == found.physical == found.hardware_threads
    assert found.numa_nodes == 1


@pytest.mark.parametrize(
    ("given", "threads", "asked"),
    [
        ({}, "3", "None"),
        ({"OMP_NUM_THREADS": "6"}, "6", "6"),
        ({"MKL_NUM_THREADS": "6"}, "None", "None"),
    ],
)
def test_the_command_line_runs_no_more_threads_unless_told(given, threads, asked):
    clean = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-c", PRINT]
    done = subprocess.run(command, env=clean | given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [threads, asked]
