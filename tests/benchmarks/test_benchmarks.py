"""Benchmarks end with the object that programs read, and keep it."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
KEYS = {"ratios", "figures", "machine", "versions", "commit"}


@pytest.fixture
def common(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("common", FOLDER / "common.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


@pytest.mark.parametrize("quick", [True, False])
def test_report_prints_and_keeps_one_object(common, capsys, quick):
    args = argparse.Namespace(json=True, quick=quick)
    common.report("name", args, {"speed/peer": 2.0}, {"a": 1}, [], ["torch"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == KEYS
    assert found["ratios"] == {"speed/peer": 2.0}
    kept = common.RESULTS / "name.json"
    assert kept.exists() != quick
    if not quick:
        assert json.loads(kept.read_text()) == found


def test_report_prints_a_table(common, capsys):
    args = argparse.Namespace(json=False, quick=True)
    common.report("name", args, {"speed/peer": 2.0}, {}, [("Title", ["who", "tokens/s"], [["us", 1234.5]])], [])
    assert capsys.readouterr().out == "\nTitle\nwho  tokens/s\nus       1234\nspeed/peer: 2.00\n"


def test_rounds_are_compared_with_one_another(common):
    assert common.ratio_of_rounds([2, 8, 3], [1, 2, 3]) == {"median": 2, "least": 1, "most": 4}


@pytest.mark.parametrize("name", ["rollout", "speculate"])
def test_a_run_that_is_not_there_is_one_sentence(name, tmp_path):
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--run", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{name}.py: --run {tmp_path}: no ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("train", "tokens-per-second/transformers"),
        ("rl_step", "step/trl"),
        ("balance", "max-vio/none"),
        ("gpu --device cpu", "gpu-llama-135m-b1/transformers"),
    ],
)
def test_quick_run_gives_its_ratio(name, ratio):
    name, *options = name.split()
    if name == "rl_step":
        pytest.importorskip("trl", reason="TRL is in the extra [bench]")
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--json", *options],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == KEYS
    assert found["ratios"][ratio] > 0
