"""Loss spikes: a loss far above those before, or the gradient norms of two steps in a row.

A value is far above where it exceeds the median of the last `window` steps by more than `threshold` robust standard
deviations (1.4826 · median absolute deviation). OLMo-core's SkipStepOptimizer has a like rule: 6 standard deviations
above the mean of 128 steps, for the loss and for the gradient norm. Median and MAD instead, since a spike that lasts
would raise a mean and widen its own bound. Nothing is a spike before there are `window` steps.

A single leap of the gradient norm is none: it is clipped. On batches of 256 tokens it happened six times in 372 steps,
up to 20-fold, never twice in a row, and the loss showed nothing.

A step is judged after its update, when both values are known; a roll-back restores what the update changed.
PaLM went back about 100 steps and left out 200 to 500 batches, some 20 times in a run (2204.02311 §5.1).
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rorqual.errors import UserError
from rorqual.sections import SpikesSection

COUNTS = ("roll_backs", "leaps", "in_a_row")  # of a checkpoint
LEAST = 0.01  # of the median: a loss that hardly varies, of text known by heart, does not spike at each tremor


def robust(
    values: Iterable[float], median: Callable[[Iterable[float]], float] = statistics.median
) -> tuple[float, float]:
    """The median, and the standard deviation of normally distributed values with this median absolute deviation."""
    values = list(values)
    middle = median(values)
    return middle, 1.4826 * median(abs(value - middle) for value in values)


class Spikes:
    """The last steps of a run, and how often it has rolled back: the same on all processes."""

    def __init__(self, section: SpikesSection) -> None:
        self.section, self.roll_backs = section, 0
        self.leaps = self.in_a_row = 0  # of the gradient norm, and spikes; both in a row
        self.history: dict[str, list[float]] = {"loss": [], "gradient norm": []}

    def find(self, loss: float, grad_norm: float) -> str | None:
        """Take a step into account; what of it is a spike, as part of a sentence. The values are finite."""
        above, leap = self._compare("loss", loss), self._compare("gradient norm", grad_norm)
        self.leaps = self.leaps + 1 if leap else 0
        spike = above or (leap if self.leaps > 1 else None)
        self.in_a_row = self.in_a_row + 1 if spike else 0
        return spike

    def check(self, what: str, saved: Sequence[int]) -> None:
        """Raises UserError where the spike `what` is to stop the run, with the steps of its checkpoints."""
        kept = f"the checkpoint of step {saved[-1]} kept" if saved else "no checkpoint yet"
        if self.section.action == "stop":
            raise UserError(
                f"{what}, so training stopped with {kept}; continue with --resume and spikes.action=roll-back, which "
                "leaves this data out, or spikes.action=continue"
            )
        if self.roll_backs >= self.section.limit:
            raise UserError(
                f"{what}, and the run has rolled back spikes.limit = {self.section.limit} times, so training stopped "
                f"with {kept}; look at the data, begin again with a lower optimizer.lr, or continue with --resume and "
                "a higher spikes.limit"
            )

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        history = {name: list(values) for name, values in self.history.items()}
        return {name: getattr(self, name) for name in COUNTS} | {"history": history}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        for name in COUNTS:
            setattr(self, name, int(state[name]))
        self.history = {name: [float(value) for value in state["history"][name]] for name in self.history}

    def _compare(self, name: str, value: float) -> str | None:
        window = self.section.window
        before = self.history[name][-window:]
        self.history[name] = [*before, value][-window:]
        if len(before) < window:
            return None
        middle, deviation = robust(before)
        bound = middle + self.section.threshold * max(deviation, LEAST * abs(middle))
        if value <= bound:
            return None
        return f"the {name} is {value:.4g}, above {bound:.4g} (spikes.threshold) after a median of {middle:.4g}"
