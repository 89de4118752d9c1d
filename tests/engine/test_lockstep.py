"""The front of an expert-parallel engine and a rank that does not answer."""

import multiprocessing

import pytest

from rorqual.engine import lockstep
from rorqual.errors import UserError


def test_a_rank_that_does_not_end_its_step_is_named(monkeypatch):
    monkeypatch.setattr(lockstep, "REPORT_SECONDS", 0.05)
    ours, theirs = multiprocessing.Pipe()
    with pytest.raises(UserError, match=r"rank 3 hangs: it did not end its step within 0\.05 seconds"):
        lockstep._report(3, ours)
    theirs.send("a report")
    assert lockstep._report(3, ours) == "a report"
    theirs.close()
    with pytest.raises(UserError, match="rank 3 has ended"):
        lockstep._report(3, ours)
