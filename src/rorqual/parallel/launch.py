"""Start a command as several processes on this machine, by torchrun."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rorqual.cores import threads_asked_for, usable_cores
from rorqual.errors import UserError
from rorqual.final_status import VARIABLE
from rorqual.sections import ParallelSection


def started_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarted() -> bool:
    """Whether torchrun has started this process anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def with_processes(section: ParallelSection, processes: int) -> ParallelSection:
    """The section for so many processes: more, or fewer, of them with data of their own."""
    others = section.pipeline * section.context
    if processes % others:
        raise UserError(
            f"--processes {processes}: the recipe's parallel.pipeline · parallel.context = {others} does not divide it"
        )
    return section.model_copy(update={"data": processes // others})


def launch(arguments: Sequence[str], processes: int, restarts: int) -> int:
    """`rorqual` with these arguments in each process → the exit status. Output of all goes to this terminal."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}", "-m", "rorqual", *arguments,
    ]  # fmt: skip
    threads = str(max(1, usable_cores() // processes))
    environment = os.environ | {"OMP_NUM_THREADS": threads_asked_for() or threads}
    with tempfile.TemporaryDirectory(prefix="rorqual-") as folder:
        said = Path(folder) / "status"
        with subprocess.Popen(command, env=environment | {VARIABLE: str(said)}) as started:
            while True:
                try:
                    status = started.wait()
                    break
                except KeyboardInterrupt:  # the processes get the signal too, save a checkpoint and end
                    continue
        return int(said.read_text()) if said.exists() else status
