"""A checkpoint exists whole or not at all, whatever happens while it is written."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from rorqual import files
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
    ("force_to_disk", files),
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
            patch.setattr(files, "discard", lambda folder: None)  # a killed process cleans nothing up
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


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    """Another byte among the weights, which stay readable."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGES = [
    (cut, "tensors.safetensors"),
    (cut, "state.json"),
    (flip, "tensors.safetensors"),
    (Path.unlink, "tensors.safetensors"),
    (Path.unlink, "state.json"),
    (lambda path: path.write_bytes(b""), "tensors.safetensors"),
    (lambda path: path.write_text("[]"), "state.json"),
    (lambda path: path.write_text('{"state": 3}'), "state.json"),
    (lambda path: path.write_bytes(b"\xff\xfe{"), "state.json"),
]


@pytest.mark.parametrize(("damage", "file"), DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_named(tmp_path, damage, file):
    said = []
    store = Checkpoints(tmp_path, 3, said.append)
    for step in (1, 2):
        store.save(step, content(step), {"n": step})
    damage(store.path(2) / file)
    left = {p.name: p.read_bytes() for p in store.path(2).iterdir()}
    assert store.load_latest()[0] == 1
    assert {p.name: p.read_bytes() for p in (store.directory / "damaged-step-2").iterdir()} == left
    assert len(said) == 1
    assert file in said[0]
    assert "damaged-step-2" in said[0]
    store.save(2, content(2), {"n": 2})
    assert store.load_latest()[0] == 2
    damage(store.path(2) / file)
    assert store.load_latest()[0] == 1
    assert (store.directory / "damaged-step-2-2").is_dir()


def test_a_run_whose_every_checkpoint_is_damaged_does_not_begin_again(tmp_path):
    store = Checkpoints(tmp_path, 3, lambda sentence: None)
    for step in (1, 2):
        store.save(step, content(step), {})
        cut(store.path(step) / "state.json")
    for _ in range(2):
        with pytest.raises(UserError, match=r"every checkpoint is damaged \(damaged-step-1, damaged-step-2\)"):
            store.load_latest()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_what_cannot_be_read_stays_where_it_is(tmp_path, monkeypatch, code, file):
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, content(1), {})
    store.save(2, content(2), {}, good=False)
    before = sorted(store.directory.rglob("*"))
    real = Path.open

    def failing(self, *args, **kwargs):
        if self.name == file:
            raise OSError(code, os.strerror(code), str(self))
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        with pytest.raises(UserError, match=rf"step-2/{file} cannot be read \({os.strerror(code)}\)"):
            store.load_latest()
    assert sorted(store.directory.rglob("*")) == before
    assert store.load_latest()[0] == 2


def test_nothing_is_deleted_while_a_state_cannot_be_read(tmp_path, monkeypatch):
    """It might be the best one; and it does not count among those kept."""
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, content(1), {}, 0.5)
    real = Path.read_bytes

    def failing(self):
        if self.parent.name in ("step-1", "step-3"):
            raise OSError(errno.EIO, "Input/output error")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        for step in (2, 3, 4):
            store.save(step, content(step), {}, 1.0)
    assert store.steps() == [1, 2, 3, 4]  # 2: no better is known
    store.save(5, content(5), {}, 1.0)
    assert store.steps() == [1, 5]


FOREIGN = ["step-2-backup", "step-2 (copy)", "step-", "step-x", "step--1", "step-01", "step-１", "old", ".trash-step-1"]


def test_foreign_folders_are_left_alone(tmp_path):
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, content(1), {})
    for name in FOREIGN:
        (store.directory / name).mkdir()
        (store.directory / name / "notes.txt").write_text("mine")
    (store.directory / "step-7").write_text("a file")
    (store.directory / "notes.txt").write_text("mine")
    assert store.load_latest()[0] == 1
    for step in (2, 3):
        store.save(step, content(step), {})
    assert store.steps() == [3]
    assert all((store.directory / name / "notes.txt").read_text() == "mine" for name in FOREIGN)
    assert (store.directory / "step-7").read_text() == "a file"
    assert (store.directory / "notes.txt").read_text() == "mine"


def test_a_linked_checkpoint_is_used_and_only_the_link_removed(tmp_path):
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, content(1), {})
    elsewhere = tmp_path / "elsewhere"
    store.path(1).rename(elsewhere)
    store.path(1).symlink_to(elsewhere)
    assert store.load_latest()[0] == 1
    store.save(2, content(2), {})
    assert [p.name for p in store.directory.iterdir()] == ["step-2"]
    assert (elsewhere / "state.json").exists()


@pytest.mark.parametrize("place", ["step-2", "step-2/tensors.safetensors", "step-2/state.json"])
def test_a_link_to_a_disk_that_is_absent_is_no_damage(tmp_path, place):
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        store.save(step, content(step), {})
    link, disk, away = store.directory / place, tmp_path / "disk", tmp_path / "away"
    link.rename(disk)
    link.symlink_to(disk)
    disk.rename(away)
    with pytest.raises(UserError, match=rf"{place} is a link to .*disk, which does not exist; mount its disk"):
        store.load_latest()
    away.rename(disk)
    assert store.load_latest()[0] == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, bad):
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, content(1), {})
    tensors = content(2)
    tensors["weights.a"][1, 1] = bad
    with pytest.raises(UserError, match=r"step-2: weights.a is not finite, .* the last good checkpoint is step 1"):
        store.save(2, tensors, {})
    assert [p.name for p in store.directory.iterdir()] == ["step-1"]


def test_what_is_not_known_to_be_good_pushes_nothing_out(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step, good in [(1, True), (2, True), (3, False), (4, False), (5, False)]:
        store.save(step, content(step), {}, good=good)
    assert store.steps() == [1, 2, 3, 4, 5]
    store.save(6, content(6), {})
    assert store.steps() == [2, 3, 4, 5, 6]
    store.save(7, content(7), {})
    assert store.steps() == [6, 7]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), "nan", True, None])
def test_a_score_that_is_no_number_is_never_best(tmp_path, bad):
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, content(1), {}, bad)
    store.save(2, content(2), {}, 2.0)
    store.save(3, content(3), {}, bad)
    store.save(4, content(4), {}, 3.0)
    assert store.best() == 2
    assert store.steps() == [2, 4]
    for step in store.steps():
        json.loads((store.path(step) / "state.json").read_text(), parse_constant=pytest.fail)


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch):
    said = []
    store = Checkpoints(tmp_path, 1, said.append)
    store.save(1, content(1), {})
    real = os.replace

    def failing(source, target):
        if Path(target).name.startswith(".deleting"):
            raise PermissionError(errno.EACCES, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    store.save(2, content(2), {})
    assert store.load_latest()[0] == 2
    assert "step-1 cannot be removed (Permission denied)" in said[0]


@pytest.mark.parametrize(("owner", "operation"), [(module, "save_file"), (files, "force_to_disk")])
def test_disk_full_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch, owner, operation):
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, content(1), {"n": 1})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, operation, full)
        with pytest.raises(
            UserError, match=r"step-2 cannot be written \(the disk is full\); free space, .*--resume; step 1 is intact"
        ) as error:
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
        with pytest.raises(UserError, match=r"step-2 cannot be written \(File too large\); .*step 1 is intact"):
            store.save(2, {"a": torch.zeros(1 << 16)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert store.load_latest()[0] == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda state: 0.0 + state["seconds"],
        lambda state: state["loader"].get("data"),
        lambda state: state["missing"],
        lambda state: int(state["seconds"]),
    ],
)
def test_an_entry_of_another_type_is_refused_with_the_checkpoint_named(tmp_path, read):
    checkpoints = Checkpoints(tmp_path, 1)
    with pytest.raises(UserError, match=r"step-3 does not fit"), checkpoints.reject_other_version(3):
        read({"seconds": "x", "loader": 7})
