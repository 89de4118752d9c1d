"""The main job: fitted to the machine and the time, and honest where the time is too short."""

import json
from dataclasses import fields

import pytest

from rorqual import speedrun as speedrun_module
from rorqual.errors import UserError
from rorqual.plan.engine_time import EngineCosts
from rorqual.plan.ledger import read_accounts
from rorqual.rl.envs.registry import open_environment
from rorqual.speedrun import outcome as outcome_module
from rorqual.speedrun import speedrun, time_plan
from rorqual.speedrun import stages as stages_module
from rorqual.speedrun.documents import LARGEST
from rorqual.speedrun.level import LEVELS, choose_level, machine_line, training_speed
from rorqual.speedrun.outcome import FEW_SAMPLES, FIRST, difficulty_table, table
from rorqual.speedrun.stages import Budget, Check, SpeedrunState, needed
from rorqual.speedrun.time_plan import forecast

TINY = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "kv_lora_rank": 16,
    "moe_intermediate_size": 32,
}


def state(tmp_path, minutes=10.0, speed=10_000.0, level=LEVELS[0]):
    environments = [open_environment(section) for section in level.environments]
    return SpeedrunState(tmp_path, 0, Budget(minutes), level, environments, speed)


def test_more_tokens_bring_harder_problems():
    chosen = [choose_level(tokens) for tokens in (0, 3e6, 30e6)]
    assert chosen[0] is chosen[1] is LEVELS[0]
    assert chosen[2] is LEVELS[-1]
    assert LEVELS[-1].describe == (
        "countdown with 3 to 4 numbers; chain_sum with 6 to 9 terms; graph_color with 5 to 8 vertices"
    )
    assert LEVELS[0].describe == "countdown with 3 numbers; chain_sum with 6 to 7 terms"


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_prompt_and_answer_fit_the_context(level):
    assert level.max_tokens + 150 <= stages_module.MODEL["max_position_embeddings"]
    assert len(level.documents) == len(level.environments)


def test_the_machine_is_measured_and_named():
    assert training_speed() > 100
    assert "threads" in machine_line()


def test_a_weak_start_is_one_that_no_family_can_climb_from():
    assert Check({"a": 0.01, "b": 0.03}, {}, 1.0).weak
    assert not Check({"a": 0.01, "b": 0.05}, {}, 1.0).weak


@pytest.mark.parametrize(("minutes", "speed"), [(2.0, 10_000.0), (10.0, 500.0)])
def test_the_minutes_that_are_named_would_do(tmp_path, minutes, speed):
    asked = needed(state(tmp_path, minutes, speed))
    assert asked > minutes
    assert 60 * asked * stages_module.PRETRAIN_SHARE * speed > stages_module.MIN_RL_TOKENS


def planned(tmp_path, monkeypatch, minutes, speed=11_000.0, sampled=8_700.0):
    """The forecast, where the engine samples so many tokens a second whatever the batch."""
    vocabulary = LARGEST + 300
    names = [f.name for f in fields(EngineCosts) if f.name not in ("spread", "source")]
    costs = EngineCosts(**dict.fromkeys(names, 0.0) | {"logits": 1 / sampled / vocabulary}, spread=0.1, source="")
    monkeypatch.setattr(time_plan, "engine_costs_here", lambda dtype: costs)
    return forecast(state(tmp_path, minutes, speed))


def test_ten_minutes_end_by_the_clock(tmp_path, monkeypatch):
    """As those of docs/training.md: 594 s, of which 253 for pre-training with its check, 207 and 109."""
    found = planned(tmp_path, monkeypatch, 10.0, 13_457.0)
    assert list(found.stages) == ["documents", "pretrain", "rl", "distill", "evaluate", "report"]
    assert found.run_seconds == pytest.approx(594, rel=0.02)
    assert found.problems == pytest.approx(257, rel=0.15)
    for name, seconds in {"documents": 7, "pretrain": 253, "rl": 207, "distill": 7, "evaluate": 109}.items():
        assert found.stages[name] == pytest.approx(seconds, rel=0.1)
    low, high = found.run_seconds_interval
    assert 550 < low < 594 < high < 650
    assert found.pretrain_tokens == pytest.approx(13_457 * (0.42 * 600 - found.stages["documents"]), rel=0.01)


def test_a_slow_engine_answers_fewer_problems_and_makes_short_runs_longer(tmp_path, monkeypatch):
    fast, slow = (planned(tmp_path, monkeypatch, 10.0, sampled=s) for s in (8_000, 2_000))
    assert fast.problems == pytest.approx(4 * slow.problems, rel=0.3)
    short = planned(tmp_path, monkeypatch, 0.5, sampled=1_000)
    assert list(short.stages) == ["documents", "pretrain", "evaluate", "report"]  # too little for RL
    low, high = short.run_seconds_interval
    assert short.run_seconds > 30
    assert high / low > 1.2


@pytest.mark.parametrize(("last", "kept"), [(0.4, True), (0.5, False), (0.6, False)])
def test_a_start_that_rl_kept_is_noticed(tmp_path, last, kept):
    lines = [
        {"step": 0, "eval_a": 0.2, "eval_b": 0.3},
        {"step": 1, "reward": 1.0},
        {"step": 2, "eval_a": last, "eval_b": 0.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert stages_module.kept_start(tmp_path) == kept


@pytest.mark.parametrize("minutes", [0.25, pytest.param(0.5, marks=pytest.mark.slow)])
def test_half_a_minute_learns_something_and_says_that_it_is_too_short(tmp_path, capsys, monkeypatch, minutes):
    """Or half as long, which the command line refuses, with a smaller network and thinking curve."""
    if minutes < 0.5:
        monkeypatch.setattr(speedrun_module, "SHORTEST", minutes)
        monkeypatch.setattr(outcome_module, "BUDGETS", [0, 32])
        for name, size in TINY.items():
            monkeypatch.setitem(stages_module.MODEL, name, size)
    summary = speedrun(tmp_path / "run", seed=5, minutes=minutes)
    said = capsys.readouterr().out
    lines = (tmp_path / "run" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    if minutes >= 0.5:  # on a busy machine the shorter one takes a step or two
        assert losses[-1] < losses[0] - 0.5
    assert json.loads(json.dumps(summary.to_dict())) == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.stages[0].name == "pretrain"
    assert any("--minutes" in note for note in summary.notes)
    assert all(word in said for word in ("tokens/s", "held-out problems", "--minutes", "report:"))
    planned = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert planned["run_seconds"] == pytest.approx(sum(planned["stages"].values()))
    account = read_accounts(tmp_path)[0]
    assert (account.run, account.unit, account.predicted) == ("run", "s", planned["run_seconds"])
    assert account.measured == pytest.approx(summary.total_seconds, rel=0.2)
    assert account.kinds == tuple(summary.seconds)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "--minutes" in page
    assert (tmp_path / "run" / "model" / "config.json").exists()
    assert table(summary).row_count == sum(len(stage.tasks) for stage in summary.stages)
    assert difficulty_table(summary).row_count == 5  # countdown has one difficulty, chain_sum four
    result = summary.stages[0].tasks["countdown"]
    assert result.problems == len(result.scores) >= FIRST
    assert result.k == FEW_SAMPLES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0.1}, r"--minutes 0\.1: must be from 0\.5"),
        ({"minutes": float("nan")}, r"--minutes nan"),
        ({"minutes": float("inf")}, r"--minutes inf"),
        ({"seed": -1}, r"--seed -1"),
        ({"seed": 2**63}, r"--seed 9223372036854775808"),
        ({"out": "file"}, r"file cannot be made \(Not a directory\)"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, message):
    (tmp_path / "file").write_text("")
    options = {"out": "run", "seed": 0, "minutes": 0.5} | options
    with pytest.raises(UserError, match=message):
        speedrun(**options | {"out": tmp_path / options["out"]})
    assert not (tmp_path / "run").exists()
