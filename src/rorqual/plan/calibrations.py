"""The share of a chip's peak that products reach: of its family by published runs, or of this machine as measured."""

from rorqual.plan.chips import Chip
from rorqual.plan.published_runs import Calibration, calibration

HERE = "this machine"  # the family of its processor


def calibration_of(chip: Chip) -> Calibration:
    if chip.family != HERE:
        return calibration(chip.family)
    from rorqual.plan.this_machine import calibration_here  # needs torch, which other plans do not wait for

    return calibration_here(chip)
