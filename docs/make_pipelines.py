"""Draws figures/pipeline-schedules.png: python docs/make_pipelines.py"""

from pathlib import Path

from rorqual.parallel.draw import draw
from rorqual.plan.schedule import SCHEDULES
from rorqual.plan.simulate import Times, simulate

PICTURE = Path(__file__).parent / "figures" / "pipeline-schedules.png"
RANKS, MICRO_BATCHES = 4, 8


def main() -> None:
    """One network on as many ranks with each schedule: a rank's forward takes 1 s, of all its stages together."""
    timelines = {}
    for name, generate in SCHEDULES.items():
        schedule = generate(RANKS, MICRO_BATCHES)
        stage = RANKS / schedule.stages
        timelines[name] = schedule, simulate(schedule, Times(F=stage, B=2 * stage, I=stage, W=stage))
    draw(timelines, PICTURE)


if __name__ == "__main__":
    main()
