"""Benchmarks end with the object that programs read, and keep it."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from rorqual.errors import UserError
from rorqual.plan.pipeline_file import read_pipeline

FOLDER = Path(__file__).parents[2] / "benchmarks"
KEYS = {"ratios", "figures", "failed", "machine", "versions", "commit"}


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture
def common(module):
    return module("common")


def test_every_file_can_be_imported_without_peers():
    """The longer runs are marked slow, and a name that is gone shall not wait for them."""
    names = [file.stem for file in sorted(FOLDER.glob("*.py")) if file.stem != "llama"]  # that one is a peer
    subprocess.run([sys.executable, "-c", f"import {', '.join(names)}"], cwd=FOLDER, check=True)


@pytest.mark.parametrize("keep", [True, False])
def test_report_prints_and_keeps_one_object(common, capsys, tmp_path, keep):
    kept = tmp_path / "results" / "name.json"
    args = argparse.Namespace(json=True, out=kept if keep else None)
    common.report("name", args, {"speed/peer": 2.0}, {"a": 1}, [], ["torch", "no-such-package"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == KEYS
    assert found["ratios"] == {"speed/peer": 2.0}
    assert found["versions"]["torch"]
    assert found["versions"]["no-such-package"] is None
    assert found["machine"]["class"] == common.machine_class()
    assert kept.exists() == keep
    if keep:
        assert json.loads(kept.read_text()) == found


@pytest.mark.parametrize("emulated", [True, False])
def test_report_prints_a_table(common, capsys, monkeypatch, emulated):
    machine = {"processor": "X", "accelerator": None, "class": "x-avx2", "cores": 2}
    machine["fastest_dtype"] = "float32" if emulated else "bfloat16"
    monkeypatch.setattr(common, "describe", lambda device: machine)
    args = argparse.Namespace(json=False, out=None)
    common.report("name", args, {"speed/peer": 2.0}, {}, [("Title", ["who", "tokens/s"], [["us", 1234.5]])], [])
    said = "; BF16 is emulated here, so all sides compute in FP32" if emulated else ""
    head = f"X (x-avx2), 2 cores{said}\n"
    assert capsys.readouterr().out == f"{head}\nTitle\nwho  tokens/s\nus       1234\nspeed/peer: 2.00\n"


def test_bf16_is_tried_where_it_is_not_emulated(common, monkeypatch):
    monkeypatch.setattr(common, "fastest_dtype", lambda: torch.float32)
    assert (common.dtypes(), common.fastest()) == (["float32"], "float32")
    monkeypatch.setattr(common, "fastest_dtype", lambda: torch.bfloat16)
    assert (common.dtypes(), common.fastest()) == (["float32", "bfloat16"], "bfloat16")


def arguments(common, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    return common.arguments("what", turn=200, whole=900)


def test_results_are_kept_by_class_of_machine(common, monkeypatch):
    args = arguments(common, monkeypatch)
    assert args.out == FOLDER / "results" / f"train-{common.machine_class()}.json"
    assert (args.turn_limit, args.limit) == (200, 900)
    args = arguments(common, monkeypatch, "--quick", "--limit", "7")
    assert args.out is None
    assert (args.turn_limit, args.limit) == (120, 7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"class": "other-avx2"}, "figures of other-avx2"),
        ({"class": None}, "without a"),
        ({"cores": 0}, "0 c"),
    ],
)
def test_another_machines_figures_are_not_overwritten(common, monkeypatch, tmp_path, change, said):
    machine = {k: v for k, v in (common.describe("cpu") | change).items() if v is not None}
    (tmp_path / "kept.json").write_text(json.dumps({"machine": machine}))
    if said is None:
        assert arguments(common, monkeypatch, "--out", str(tmp_path / "kept.json")).out == tmp_path / "kept.json"
    else:
        with pytest.raises(UserError, match=said):
            arguments(common, monkeypatch, "--out", str(tmp_path / "kept.json"))


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("vendor_id : AuthenticAMD\ncpu family : 25\nmodel : 1", "zen3"),
        ("vendor_id : AuthenticAMD\ncpu family : 25\nmodel : 17", "zen4"),
        ("vendor_id : AuthenticAMD\ncpu family : 25\nmodel : 33", "zen3"),
        ("vendor_id : AuthenticAMD\ncpu family : 26\nmodel : 2", "zen5"),
        ("vendor_id : GenuineIntel\ncpu family : 6\nmodel : 207", "emeraldrapids"),
        ("vendor_id : GenuineIntel\ncpu family : 6\nmodel : 1", "genuineintel-6-1"),
        ("CPU implementer : 0x41\nCPU architecture: 8\nCPU part : 0xd40", "neoverse-v1"),
        ("", "some-chip"),
    ],
)
def test_a_class_is_generation_and_instructions(module, monkeypatch, cpuinfo, name):
    machines = module("machines")
    monkeypatch.setattr(machines.Path, "read_text", lambda path: cpuinfo + "\n\nmodel : 999")
    monkeypatch.setattr(machines, "describe_machine", lambda: {"processor": "Some (chip)"})
    monkeypatch.setattr(machines.cpu, "has_matrix_unit", lambda: False)
    monkeypatch.setattr(machines.cpu, "capability", lambda: "avx2")
    assert machines.machine_class() == f"{name}-avx2"


def test_rounds_are_compared_with_one_another(common):
    assert common.ratio_of_rounds([2, 8, 3], [1, 2, 3]) == {"median": 2, "least": 1, "most": 4}


@pytest.mark.parametrize("name", ["rollout", pytest.param("speculate", marks=pytest.mark.slow)])
def test_a_run_that_is_not_there_is_one_sentence(name, tmp_path):
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--run", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{name}.py: --run {tmp_path}: no ")
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def speedrun(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "speedrun"
    command = [Path(sys.executable).parent / "rorqual", "speedrun", "--minutes", "6", "--out", out]
    subprocess.run(command, capture_output=True, check=True)
    return out


def quick(name, *options, **environment):
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--json", *map(str, options)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == KEYS
    return found


def test_the_r1_pipeline_is_cut_before_its_first_rl(module, tmp_path):
    """Each seed goes on from the common stages' model and samples."""
    halves = module("r1").Halves.of(FOLDER.parent / "recipes" / "r1-smollm2.toml", tmp_path)
    assert halves.common == ["cold-start", "reward"]
    rl, sampling, both, student = read_pipeline(halves.file_of("seed-0"), tmp_path / "seed-0", 0).stages
    assert [stage.name for stage in (rl, sampling, both, student)] == [*halves.by_seed, "student"]
    assert [stage.name for stage in read_pipeline(halves.file_of("seed-1"), tmp_path / "seed-1", 1).stages] == [
        "reasoning-rl", "rejection-sampling", "all-rl",
    ]  # fmt: skip
    start = f"model.path={tmp_path}/common/cold-start/student/model"
    assert start in rl.overrides
    assert start in sampling.overrides
    assert f"reward.model.path={tmp_path}/common/reward/model" in both.overrides
    assert f"teacher={tmp_path}/seed-0/reasoning-rl/model" in sampling.overrides
    assert f"mix.0.path={tmp_path}/common/cold-start/samples.jsonl" in student.overrides
    assert f"mix.1.path={tmp_path}/seed-0/rejection-sampling/samples.jsonl" in student.overrides


@pytest.mark.slow
def test_the_r1_pipeline_is_measured():
    stages = quick("r1")["figures"]["stages"]
    assert list(stages) == ["start", "cold", "tune", "again"]
    assert len(stages["again"]["chain_sum"]["gain_over_cold"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("train", "tokens-per-second/transformers"),
        ("rl_step", "step/trl"),
        ("rl_reward", "steps/trl"),
        ("balance", "max-vio/none"),
        ("decode", "decode-b1-int4/transformers-fp32"),  # llama.cpp, which may be missing, takes nobody along
        ("gpu --device cpu", "gpu-llama-135m-b1/transformers"),
        ("kernels", "SwiGLU, forward/none"),
        ("moments", "optimizer-speed/8bit"),
        ("expert_balance", "balance-prefill-1/published-greedy"),
        ("processes", "processes/threads"),
        ("fp8_memory", "step-seconds/fp8-v3-8bit-moments"),
        ("rounded_rollouts", "tokens-per-second/int4-rollouts"),
        ("exact", "step/exact, small mixture of experts"),
        ("rl_bias", "max-vio/live"),
        ("mtp_rl", "acceptance-seed-0/without"),
        ("kv_drift", "same-top-token/latent-fp8"),
        ("quantize", "perplexity-int8-rtn/trained-here-bf16"),
        ("pipeline", "dualpipev/1f1b"),
        ("planner_rl", "predicted/dense, FP8 rollouts"),
        ("pipeline --mode compute", "bubble-measured/simulated"),
    ],
)
def test_quick_run_gives_its_ratio(name, ratio):
    name, *options = name.split()
    if name in ("rl_step", "rl_reward"):
        pytest.importorskip("trl", reason="TRL is in the extra [bench]")
    assert quick(name, *options)["ratios"][ratio] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ratio"), [("rollout", "speedrun-rl/s a step"), ("speculate", "ngram-smollm2-copies/without")]
)
def test_quick_run_with_a_speedrun_gives_its_ratio(name, ratio, speedrun):
    assert quick(name, "--run", speedrun)["ratios"][ratio] > 0


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"PATH": "/nowhere"}])
def test_quick_run_on_nodes_with_and_without_namespaces(environment):
    found = quick("dispatch", "--limit", 1500, **environment)
    links = found["figures"]["links"]
    if environment:
        assert not links["real"]
        assert links["how"] == "no namespaces, the command ip is not here: ranks wait before they send"
    plain, ours = (found["figures"]["contestants"][name] for name in ("plain", "two-hop FP8, overlap"))
    assert (plain["on_the_wire"] is None) == (not links["real"])
    assert ours["between_nodes"] < 0.4 * plain["between_nodes"]
    assert found["ratios"]["step-shaped-links/plain"] > 0


@pytest.mark.slow
def test_a_student_is_taught_and_tuned_for_as_long(tmp_path):
    """All branches run, and what has ended is not run again."""
    words = ("student", "--seconds", "1", "--folder", tmp_path)
    figures = quick(*words)["figures"]
    taught, alone = figures["runs"][:2]
    assert (taught["branch"], alone["branch"]) == ("distillation", "RL alone")
    assert taught["samples"] > 0
    asked = tomllib.loads((tmp_path / "rl-0" / "recipe.toml").read_text())["seconds"]
    assert asked == pytest.approx(taught["training"] + taught["sampling"])
    assert set(figures["before"]["tasks"]) == {"chain_sum", "simple_equations", "leg_counting"}
    assert len(figures["differences"]["RL alone"]["seeds"]) == 1
    assert quick(*words)["figures"] == figures


@pytest.mark.slow
def test_a_short_run_of_fp8_losses():
    figures = quick("fp8_loss")["figures"]
    for format in ("control", "fp8", "fp8-tensor", "mxfp8"):
        assert len(figures["nats_difference"][format]["seeds"]) == 1
        assert abs(figures["relative_loss_difference"][format]["mean"]) < 0.05
    assert all(0.98 < cosine <= 1 for layers in figures["gradient_cosines"].values() for cosine in layers.values())
