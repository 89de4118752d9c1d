"""Rollouts on Ray equal those of an undisturbed run, whatever happens to the workers."""

import pytest

ray = pytest.importorskip("ray", reason="rollouts on Ray need the extra `cluster`")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One Ray for all tests, which takes seconds to start; runs join it."""
    for attempt in range(3):
        try:
            ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20,
                     log_to_driver=False, logging_level="ERROR")  # fmt: skip
            break
        except Exception:
            ray.shutdown()
            if attempt == 2:
                raise
    yield
    ray.shutdown()
