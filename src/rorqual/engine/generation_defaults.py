"""How a model wants to be sampled."""

from pathlib import Path
from typing import Any

from rorqual.checkpoint.describe import read_released
from rorqual.engine.sampling_params import SamplingParams
from rorqual.errors import UserError

DEFAULTS = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 512}  # R1's settings, "Evaluation"; our length


def default_sampling(model: str | Path, **given: Any) -> SamplingParams:
    """What is given (and not None), else what the model's release says (generation_config.json, or a GGUF file's
    header), else R1's settings.

    Raises UserError for a file that cannot be read, a wrong value in it, or a setting that we cannot honour.
    """
    released = read_released(model)
    if released.unhonoured:
        raise UserError(released.unhonoured[0])
    said, given = dict(released.sampling), {name: value for name, value in given.items() if value is not None}
    if "max_tokens" in given:
        said.pop("max_length", None)
    elif "max_length" in said:
        said["max_tokens"] = said["max_length"]
    return SamplingParams(**DEFAULTS | said | given)
