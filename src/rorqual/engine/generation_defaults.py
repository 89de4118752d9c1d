"""Default sampling parameters of a model."""

from pathlib import Path
from typing import Any

from rorqual.checkpoint.describe import read_released
from rorqual.engine.sampling_params import SamplingParams
from rorqual.errors import UserError

DEFAULTS = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 512}  # R1, "Evaluation"; max_tokens is ours


def default_sampling(model: str | Path, **given: Any) -> SamplingParams:
    """Sampling parameters: those `given` (and not None), else the release's (generation_config.json or GGUF header),
    else R1's.

    Raises UserError for a file that cannot be read, an invalid value in it, or an unsupported setting.
    """
    released = read_released(model)
    if released.unhonoured:
        raise UserError(released.unhonoured[0])
    released_params, given = (
        dict(released.sampling),
        {name: value for name, value in given.items() if value is not None},
    )
    if "max_tokens" in given:
        released_params.pop("max_length", None)
    elif "max_length" in released_params:
        released_params["max_tokens"] = released_params["max_length"]
    return SamplingParams(**DEFAULTS | released_params | given)
