"""The picture is a PNG of the promised width, with a panel per schedule."""

import matplotlib.image
import pytest

from rorqual.errors import UserError
from rorqual.parallel.draw import draw
from rorqual.plan.schedule import SCHEDULES
from rorqual.plan.simulate import Times, simulate


def test_a_picture_of_each_schedule(tmp_path):
    schedules = {name: generate(2, 4) for name, generate in SCHEDULES.items()}
    timelines = {name: (schedule, simulate(schedule, Times(1, 2, 1, 1))) for name, schedule in schedules.items()}
    draw(timelines, tmp_path / "all.png")
    draw({"1f1b": timelines["1f1b"]}, tmp_path / "one.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    every, one = (matplotlib.image.imread(tmp_path / file) for file in ("all.png", "one.png"))
    assert every.shape[1] == one.shape[1] == 1600
    assert 2 * one.shape[0] < every.shape[0] < 3 * one.shape[0]
    assert every.std() > 0.05
    with pytest.raises(UserError, match=r"all.png/x.png cannot be written"):
        draw(timelines, tmp_path / "all.png" / "x.png")
