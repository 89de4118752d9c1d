"""Schedules over a run: learning rate, MTP weight, bias update speed, batch size.

`progress` in [0, 1] is the fraction of the run that is done, in steps or in seconds.
"""

import math

from rorqual.recipe import BalanceSection, MTPSection, ScheduleSection, TrainSection
from rorqual.sections import V3_CONSTANT

# V3 §4.2: after V3_CONSTANT, cosine to 0.1 of the peak over 4.3 T tokens, 0.1 for 333 B, then 7.3e-6 of 2.2e-4.
V3_COSINE, V3_TAIL = 14.3 / 14.8, 14.633 / 14.8
V3_LOW, V3_LAST = 0.1, 7.3e-6 / 2.2e-4


def schedule_factor(section: ScheduleSection, progress: float) -> float:
    """Learning rate as a fraction of its peak, with linear warm-up over the first `section.warmup` of the run.

    `v3` follows V3 §4.2 in fractions of its 14.8 T tokens; `cosine` decays to `final` over the rest of the run;
    `wsd` stays at the peak, then decays linearly to `final` over the last `decay` of the run (MiniCPM, 2404.06395 §4);
    `constant` stays at the peak.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < section.warmup:
        return progress / section.warmup
    if section.name == "v3":
        if progress < V3_CONSTANT:
            return 1.0
        if progress < V3_COSINE:
            return _cosine((progress - V3_CONSTANT) / (V3_COSINE - V3_CONSTANT), V3_LOW)
        return V3_LOW if progress < V3_TAIL else V3_LAST
    if section.name == "cosine":
        return _cosine((progress - section.warmup) / max(1 - section.warmup, 1e-9), section.final)
    if section.name == "wsd" and progress > 1 - section.decay:
        return section.final + (1 - section.final) * (1 - progress) / section.decay
    return 1.0


def _cosine(done: float, final: float) -> float:
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def mtp_weight(section: MTPSection, progress: float) -> float:
    """λ of the MTP loss: 0.3 for the first 10 T tokens of V3, 0.1 after (V3 §4.2)."""
    return section.weight if progress < section.switch_at else section.final_weight


def bias_speed(section: BalanceSection, progress: float) -> float:
    """γ of the correction bias: 0.001 for 14.3 T tokens of V3, 0 after (V3 §4.2)."""
    return section.bias_speed if progress < section.bias_stop_at else 0.0


def batch_size(section: TrainSection, progress: float) -> int:
    """Sequences per step: linear from the ramp's first size to `batch_size` (V3 §4.2: 3072 → 15360)."""
    if section.batch_ramp is None:
        return section.batch_size
    first, until = section.batch_ramp
    done = min(progress / until, 1.0) if until > 0 else 1.0
    return max(1, round(first + (section.batch_size - first) * done))
