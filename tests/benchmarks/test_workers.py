"""benchmarks/workers.py: a contestant that crashes or crawls is out with a sentence, the others' figures come."""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
FAKES = """
import os, signal, sys, time
from workers import answer

class Steady:
    def turn(self, value): return value

class Crashes:
    turns = 0
    def turn(self, value):
        self.turns += 1
        if self.turns > 1: os.kill(os.getpid(), signal.SIGSEGV)
        return value

class Crawls:
    def turn(self, value): time.sleep(600)

class Raises:
    def turn(self, value): raise ValueError("no such setting\\nsecond line")

class Ends:
    def turn(self, value): sys.exit(3)

class Forgets:
    def turn(self, value): os.kill(os.getpid(), signal.SIGKILL)

SPINS = os.environ.get("GOMP_SPINCOUNT", "as it is")

class Spins:
    def turn(self): return SPINS

class Loops:
    def turn(self, value):
        for i in range(100): answer(i)
"""


@pytest.fixture
def module(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    (tmp_path / "fakes.py").write_text(FAKES)
    workers = importlib.import_module("workers")
    # sys.path and not PYTHONPATH alone, since `rorqual` may come from anywhere on it.
    monkeypatch.setitem(workers.INHERITED, "PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    return importlib.import_module


@pytest.fixture
def workers(module):
    return module("workers")


@pytest.fixture
def field(workers):
    with workers.Field(step=300, whole=300) as field:
        yield field


def enter(field, *kinds, ours="Steady"):
    for kind in kinds:
        field.enter(kind.lower(), f"fakes:{kind}", ours=kind == ours)


def race(module, field, names):
    """What a benchmark does: turns, ratios against ours where there are any, a table."""
    common = module("common")
    found = field.turns(names, "turn", (6.0,), 3)
    ratios = {f"speed/{name}": common.ratio_of_rounds(found["steady"], found[name])["median"]
              for name in names if name != "steady" and {name, "steady"} <= found.keys()}  # fmt: skip
    rows = [[name, common.median(found, name)] for name in names]
    return lambda json: common.report(
        "race", argparse.Namespace(json=json, out=None), ratios, {}, [("Race", ["who", "speed"], rows)], [],
        field.failed, field.ours,
    )  # fmt: skip


def test_one_peer_crashes_and_one_crawls(module, field, capsys):
    enter(field, "Steady", "Crashes", "Crawls")
    field.enter("peer", "fakes:Steady")
    field._workers["crawls"].step = 0.1
    say = race(module, field, ["steady", "crashes", "crawls", "peer"])
    say(json=False)
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    assert ["crashes", "crashed: SIGSEGV (turn)"] in lines
    assert ["crawls", "over 0.1 s (turn)"] in lines
    assert ["speed/peer:", "1.00"] in lines
    assert lines[3:7] == [["steady", "6"], ["crashes", "–"], ["crawls", "–"], ["peer", "6"]]
    say(json=True)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["failed"] == {"crashes": "crashed: SIGSEGV (turn)", "crawls": "over 0.1 s (turn)"}
    assert found["ratios"] == {"speed/peer": 1.0}


def test_ours_that_crashes_is_an_error_after_the_table(module, field, capsys):
    enter(field, "Steady", "Crashes", ours="Crashes")
    with pytest.raises(SystemExit, match="ours did not come through: crashes"):
        race(module, field, ["steady", "crashes"])(json=False)
    assert "crashed: SIGSEGV (turn)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Raises", "ValueError: no such setting (turn)"),
        ("Ends", "crashed: exit code 3 (turn)"),
        ("Forgets", "crashed: SIGKILL, as when memory runs out (turn)"),
    ],
)
def test_how_it_ended_is_a_sentence(field, kind, said):
    enter(field, kind)
    process = psutil.Process(field._workers[kind.lower()]._process.pid)
    assert field.ask(kind.lower(), "turn", 1) is None
    assert field.failed == {kind.lower(): said}
    assert not process.is_running()
    assert field.ask(kind.lower(), "turn", 1) is None, "it stays out"


def test_what_cannot_be_made_is_out(field):
    assert not field.enter("peer", "absent:Side")
    assert field.failed == {"peer": "ModuleNotFoundError: No module named 'absent' (start)"}


def test_all_turns_together_have_a_limit(field):
    enter(field, "Crawls")
    field._workers["crawls"].whole = field._workers["crawls"]._spent + 0.1
    field.ask("crawls", "turn", 1)
    assert field.failed["crawls"].startswith("over ")
    assert field.failed["crawls"].endswith(" s in all (turn)")


def test_a_loop_of_a_peers_own_answers_turn_by_turn(field):
    enter(field, "Loops", "Steady")
    assert field.turns(["loops", "steady"], "turn", (7,), 3) == {"loops": [0, 1, 2], "steady": [7, 7, 7]}


def test_only_our_process_spins_shortly(workers, field, monkeypatch):
    """A peer has OpenMP as it is by default while its module is imported."""
    monkeypatch.delitem(workers.INHERITED, "GOMP_SPINCOUNT", raising=False)
    for name in ("ours", "peer"):
        field.enter(name, "fakes:Spins", ours=name == "ours")
    assert (field.ask("ours", "turn"), field.ask("peer", "turn")) == ("20000", "as it is")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells children that their parent died")
def test_a_killed_benchmark_leaves_nobody_behind(workers, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nsys.path.insert(0, sys.argv[1])\nfrom workers import Field\nfield = Field(300, 300)\n"
        "field.enter('crawls', 'fakes:Crawls')\nprint(field._workers['crawls']._process.pid, flush=True)\n"
        "field.ask('crawls', 'turn', 1)\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script), str(FOLDER)], stdout=subprocess.PIPE, text=True, env=workers.INHERITED
    ) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    assert psutil.wait_procs([child], timeout=60)[0]
