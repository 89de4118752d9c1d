"""What first steps of a recipe took on this machine (`rorqual plan RECIPE --rehearse`), kept for plans of its runs."""

import hashlib
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rorqual import strict_json
from rorqual.kernels.dtypes import compute_dtype
from rorqual.model.model_directory import model_directory
from rorqual.plan.fitting import LEAST_SPREAD
from rorqual.plan.measured_here import keep_entry, read_entry
from rorqual.recipe import PretrainRecipe, Recipe, RLRecipe, SFTRecipe

# What neither the work of a step nor the answers' lengths at the start depend on. The dtype is part of an entry's key.
FREE: dict[str, Any] = {
    **dict.fromkeys(
        ("name", "out", "seed", "track", "device", "steps", "seconds", "warmup_steps", "decay", "save_every"), True
    ),
    **dict.fromkeys(("keep", "sample_every", "eval_every", "eval_problems", "keep_start", "schedule", "spikes"), True),
    "model": {"dtype"},
    "rollouts": {"workers", "staleness", "threads", "gpus"},
    "train": {"steps", "epochs", "seconds", "batch_ramp", "eval_every", "save_every", "keep"},
}


@dataclass(frozen=True)
class RehearsedStep:
    """Of RL."""

    length: float  # mean tokens of an answer
    spread: float  # standard deviation of the logarithm of an answer's tokens
    truncated: float  # share of the answers that the limit cut
    trained_tokens: float  # prompts and padding included
    rollout: float  # seconds
    rewards: float
    training: float
    seconds: float  # of the whole step


@dataclass(frozen=True)
class RLRehearsal:
    prompt: float  # mean tokens
    steps: tuple[RehearsedStep, ...]

    @property
    def warm(self) -> tuple[RehearsedStep, ...]:
        """The later half: the first step compiles and allocates, and lengths change most in the first steps."""
        return self.steps[len(self.steps) // 2 :]

    def median(self, what: str) -> float:
        return statistics.median(getattr(step, what) for step in self.warm)

    @property
    def noise(self) -> float:
        return noise([step.seconds for step in self.warm])


@dataclass(frozen=True)
class TrainingRehearsal:
    tokens: float  # of a step
    seconds: tuple[float, ...]  # of each step

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / statistics.median(self.seconds[1:] or self.seconds)

    @property
    def noise(self) -> float:
        return noise(list(self.seconds[1:] or self.seconds))


def noise(seconds: list[float]) -> float:
    """Standard deviation of the logarithm of what a step takes in a run, known from so few."""
    found = statistics.stdev(map(math.log, seconds)) if len(seconds) > 1 else 3 * LEAST_SPREAD
    return max(found, LEAST_SPREAD) * math.sqrt(1 + 1 / len(seconds))


def kept_rehearsal(recipe: RLRecipe) -> RLRehearsal | None:
    """Of a recipe with the same model, problems and settings of a step; None where there is none."""
    return _kept(recipe, RLRehearsal)


def kept_training(recipe: PretrainRecipe | SFTRecipe) -> TrainingRehearsal | None:
    return _kept(recipe, TrainingRehearsal)


def keep_rehearsal(recipe: Recipe, rehearsal: RLRehearsal | TrainingRehearsal) -> Path:
    """Raises UserError where it cannot be written."""
    return keep_entry(compute_dtype(recipe.model.dtype), asdict(rehearsal), f"rehearsal {fingerprint(recipe)}")


def _kept(recipe: Recipe, kind: type[Any]) -> Any:
    found = read_entry(compute_dtype(recipe.model.dtype), f"rehearsal {fingerprint(recipe)}")
    try:
        return TypeAdapter(kind).validate_python(found)
    except ValidationError:
        return None


def fingerprint(recipe: Recipe) -> str:
    """Of what a step's work and its answers depend on: settings, and the size and time of the model's weights."""
    free = {name: value for name, value in FREE.items() if name in type(recipe).model_fields}
    fields = recipe.model_dump(mode="json", exclude=free)
    weights: list[tuple[str, int, int]] = []
    if recipe.model.path is not None:
        path = Path(recipe.model.path)
        files = [path] if path.is_file() else sorted(model_directory(path).glob("*.safetensors"))
        weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = strict_json.dumps({"fields": fields, "weights": weights}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
