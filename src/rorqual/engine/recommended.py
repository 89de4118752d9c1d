"""How a model wants to be sampled."""

import json
from pathlib import Path
from typing import Any

from rorqual.engine.sampler import SamplingParams
from rorqual.errors import UserError

R1 = {"temperature": 0.6, "top_p": 0.95}  # R1's settings, "Evaluation"


def recommended(directory: Path, **given: Any) -> SamplingParams:
    """What is given (and not None), else what the model's generation_config.json says, else R1's settings.

    Raises UserError for a file that is not JSON.
    """
    path = directory / "generation_config.json"
    try:
        own = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e}); restore the file from its source") from None
    if not isinstance(own, dict):
        raise UserError(f"{path} must hold a JSON object; restore the file from its source")
    names = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_tokens": "max_new_tokens"}
    found = {ours: own[theirs] for ours, theirs in names.items() if own.get(theirs)}
    return SamplingParams(**R1 | {"max_tokens": 512} | found | {k: v for k, v in given.items() if v is not None})
