"""What was measured on this machine, kept for later plans: a JSON file with entries for each processor, number of
threads and dtype."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from rorqual import strict_json
from rorqual.files import write_text
from rorqual.plan.hardware import describe_machine

VARIABLE = "RORQUAL_CALIBRATION"  # where it is kept, instead of in the user's cache


def read_entry(dtype: torch.dtype, what: str = "") -> Any:
    """An entry of this machine, None where there is none. what: beside the costs of training steps."""
    return _read().get(_key(dtype, what))


def keep_entry(dtype: torch.dtype, value: Any, what: str = "") -> Path:
    """Raises UserError where it cannot be written."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, strict_json.dumps(_read() | {_key(dtype, what): value}, indent=1))
    return path


def calibrated_on() -> str:
    """The source of costs that were measured on this machine."""
    machine = describe_machine()
    return f"calibrated on {machine['processor']}, {machine['threads']} threads"


def _read() -> dict[str, Any]:
    """All entries; a damaged file counts as none."""
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(dtype: torch.dtype, what: str) -> str:
    machine = describe_machine()
    parts = (machine["processor"], machine["threads"], machine["compiled_functions"], machine["torch"], dtype)
    return ", ".join(map(str, (*parts, what) if what else parts))


def _path() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(VARIABLE) or cache / "rorqual" / "calibration.json")
