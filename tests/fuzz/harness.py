"""Runs the command line on damaged files, each trial in a forked process, and prints what came out wrong.

python tests/fuzz/harness.py SEED SECONDS [TARGET …]; TARGET@NUMBER is one trial, and RORQUAL_FUZZ_KEEP=FOLDER keeps the
folders of failures there.

Right is: an answer, or one sentence and exit status 2. Wrong is a traceback, another status, the end by a signal, more
than a minute of computing, and any file changed that the command was only to read.
"""

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `helpers`, as pytest does

import torch

from fuzz.targets import TARGETS, make_seeds

torch.set_num_threads(1)
CPU_SECONDS, WALL_SECONDS = 60, 300
ROOM = 4 << 30  # bytes of address space beyond what the harness has


def snapshot(folder):
    """Path → hash of every file."""
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}  # fmt: skip


def run(words, folder, stdin):
    """(exit status or minus the signal, stdout, stderr) of the command line in a process of its own."""
    out, err = folder / ".out", folder / ".err"
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
            source = folder / ".in"
            source.write_bytes(stdin)
            os.dup2(os.open(source, os.O_RDONLY), 0)
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in enumerate("rww"))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
            os.chdir(folder)
            sys.argv = ["rorqual", *words]
            from rorqual.cli.entry import main

            main()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    until = time.monotonic() + WALL_SECONDS
    status = None
    while status is None:
        found, raw = os.waitpid(pid, os.WNOHANG)
        if found:
            status = os.waitstatus_to_exitcode(raw)
        elif time.monotonic() > until:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            status = -signal.SIGALRM
        else:
            time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it may have left running
    said = [path.read_text(errors="replace") for path in (out, err)]
    for name in (".out", ".err", ".in"):
        (folder / name).unlink(missing_ok=True)
    return status, *said


def complaint(status, err, before, after, writes):
    """What is wrong with a trial; None where nothing is."""
    if "Traceback" in err or "Traceback" in err.replace("\\n", "\n"):
        return "a traceback: " + (err.strip().splitlines() or [""])[-1]
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    if status not in (0, 2):
        return f"exit status {status}"
    said = [line for line in err.splitlines() if line.startswith("rorqual: ")]
    if status == 2 and len(said) != 1 and "Usage:" not in err:
        return f"{len(said)} sentences"
    if said and len(said[0]) > 1000:
        return f"a sentence of {len(said[0])} characters"
    contents = set(after.values())
    for path, content in before.items():
        if not path.startswith(writes) and after.get(path) != content:
            return f"{path} was changed or removed"
        if "/checkpoints/" in path and content not in contents:
            return f"{path} is gone"
    return None


def trial(name, number, seed, seeds, folder):
    """(kind, what is wrong, words, stderr) of one trial in a fresh copy of the seeds."""
    target = TARGETS[name]
    shutil.copytree(seeds, folder)
    words, stdin = target.prepare(folder, random.Random(f"{seed}/{name}/{number}") if number else None)
    before = snapshot(folder)
    status, _, err = run(words, folder, stdin)
    wrong = complaint(status, err, before, snapshot(folder), target.writes)
    if not wrong and number == 0 and status != target.status:
        wrong = f"the undamaged files: exit status {status}"
    return "wrong" if wrong else "answered" if status == 0 else "refused", wrong, words, err


def main(seed, seconds, names):
    counts = {}
    keep = os.environ.get("RORQUAL_FUZZ_KEEP")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        seeds, folder = Path(place) / "seeds", Path(place) / "trial"
        make_seeds(seeds)
        for chosen in names:
            name, _, only = chosen.partition("@")
            number, until = int(only or 0), time.monotonic() + seconds / len(names)
            while True:
                kind, wrong, words, err = trial(name, number, seed, seeds, folder)
                counts.setdefault(name, {"answered": 0, "refused": 0, "wrong": 0})[kind] += 1
                if wrong:
                    told = {"trial": f"{name}@{number}", "wrong": wrong, "words": words, "err": err[-1500:]}
                    print(json.dumps(told), flush=True)
                    if keep:
                        shutil.copytree(folder, Path(keep) / f"{name}@{number}", dirs_exist_ok=True)
                shutil.rmtree(folder)
                number += 1
                if only or time.monotonic() > until:
                    break
    print(json.dumps({"seed": seed, "counts": counts}))
    return int(any(found["wrong"] for found in counts.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3:] or list(TARGETS)))
