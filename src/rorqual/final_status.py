"""How one of several processes tells the command that started them not to start them again.

torchrun takes every exit status but 0 for a death. A process that ends on purpose, such as for a setting that is
refused, leaves its status in a file and ends with 0; should another of them die of that, those that are started anew
find the file and end too.
"""

import os
from pathlib import Path

VARIABLE = "RORQUAL_STATUS_FILE"


def _file() -> Path | None:
    path = os.environ.get(VARIABLE)
    return None if path is None else Path(path)


def final_status(status: int) -> int:
    """The exit status for a process that ends with `status` on purpose."""
    file = _file()
    if file is None:
        return status
    file.write_text(str(status))
    return 0


def ended() -> bool:
    """Whether one of the processes has ended on purpose."""
    file = _file()
    return file is not None and file.exists()
