"""A checkpoint exists whole or not at all, whatever happens while it is written."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from rorqual.errors import UserError
from rorqual.train import checkpoints as module
from rorqual.train.checkpoints import Checkpoints


class Crash(BaseException):
    """Stands for SIGKILL: no handler may clean up after it."""


def content(step):
    return {"weights.a": torch.full((3, 2), float(step)), "rng.torch": torch.arange(5, dtype=torch.uint8)}


def test_last_k_and_the_best_are_kept(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step, score in enumerate([3.0, 1.0, 2.0, None, 2.5], start=1):
        store.save(step, content(step), {"step": step}, score)
    assert store.steps() == [2, 4, 5]
    assert store.best() == 2
    step, tensors, state = store.load_latest()
    assert (step, state) == (5, {"step": 5})
    assert torch.equal(tensors["weights.a"], content(5)["weights.a"])
    assert tensors["rng.torch"].dtype == torch.uint8


def test_nothing_there(tmp_path):
    assert Checkpoints(tmp_path, 1).load_latest() is None


OPERATIONS = [
    ("save_file", module),
    ("_force_to_disk", module),
    ("replace", os),
    ("rmtree", shutil),
    ("mkdir", Path),
    ("write_text", Path),
]


def crash_points():
    return [(name, owner, call, late) for name, owner in OPERATIONS for call in range(4) for late in (False, True)]


@pytest.mark.parametrize(("name", "owner", "call", "late"), crash_points())
def test_a_crash_at_any_point_leaves_a_good_checkpoint(tmp_path, monkeypatch, name, owner, call, late):
    """Crash at the call-th use of each operation, before or after it took effect; keep=1 is the harshest."""
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, content(1), {"n": 1}, 2.0)
    real, seen = getattr(owner, name), 0

    def crashing(*args, **kwargs):
        nonlocal seen
        seen += 1
        if seen == call + 1:
            if late:
                real(*args, **kwargs)
            raise Crash
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crashing)
        with contextlib.suppress(Crash):
            store.save(2, content(2), {"n": 2}, 1.0)
    step, tensors, state = Checkpoints(tmp_path, keep=1).load_latest()
    assert state == {"n": step}
    assert torch.equal(tensors["weights.a"], content(step)["weights.a"])
    store.save(3, content(3), {"n": 3})
    assert store.load_latest()[0] == 3
    assert not [p for p in store.directory.iterdir() if not p.name.startswith("step-")]


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, file):
    store = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        store.save(step, content(step), {"n": step})
    path = store.path(2) / file
    path.write_bytes(path.read_bytes()[:-9])
    assert store.load_latest()[0] == 1
    store.save(2, content(2), {"n": 2})
    assert store.load_latest()[0] == 2


@pytest.mark.parametrize("operation", ["save_file", "_force_to_disk"])
def test_disk_full_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch, operation):
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, content(1), {"n": 1})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, operation, full)
        with pytest.raises(UserError, match=r"step-2: the disk is full; .*--resume; step 1 is intact") as error:
            store.save(2, content(2), {"n": 2})
    assert "\n" not in str(error.value)
    assert store.load_latest()[0] == 1
    assert [p.name for p in store.directory.iterdir()] == ["step-1"]


def test_a_really_full_disk(tmp_path):
    """safetensors reports it from Rust, not as an OSError."""
    resource = pytest.importorskip("resource")
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, content(1), {})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        with pytest.raises(UserError, match=r"step-2: .*step 1 is intact"):
            store.save(2, {"a": torch.zeros(1 << 16)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert store.load_latest()[0] == 1
