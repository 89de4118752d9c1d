import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import tomllib

import pytest

from helpers.processes import run
from rorqual.errors import UserError
from rorqual.parallel.mesh import build_mesh
from rorqual.recipe import ParallelSection, PretrainRecipe
from rorqual.train.run_folder import first_alone, open_run, to_toml
from rorqual.train.telemetry import Telemetry


def test_a_recipe_survives_toml(make_recipe):
    recipe = make_recipe(
        model__config={"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "hidden_size": 8},
        tokenizer__special_tokens=["<think>", 'a "quoted" one', "é"],
        train__batch_ramp=[2, 0.25],
    )
    assert PretrainRecipe.model_validate(tomllib.loads(to_toml(recipe.model_dump()))) == recipe


def test_keys_that_need_quotes():
    values = {
        "é": {"": "\x7f\x00\u2028\\u007f"},
        "a b": {"c.d": [1, 2.5, True, "x"]},
        "list": [{"x": 1}, {"y": {"z": 2}}],
        "empty": [],
    }
    assert tomllib.loads(to_toml(values)) == values


def test_a_place_that_cannot_be_written(make_recipe, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot be written .*set out to a writable place"):
        start(make_recipe())


def test_metrics_past_the_checkpoint_and_cut_lines_are_dropped(tmp_path):
    first = Telemetry(tmp_path, 10, "steps")
    for step in range(1, 6):
        first.log(step, loss=1.0 / step)
    first.note("something happened")
    first.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')
    again = Telemetry(tmp_path, 10, "steps", resume_step=3)
    again.log(4, loss=0.5, seconds=None)
    again.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.5)]
    Telemetry(tmp_path, 10, "steps").close()  # a run from the start begins a new file
    assert path.read_text() == ""


def test_trackio_gets_the_numbers(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    seen = []
    monkeypatch.setattr(trackio, "init", lambda **kwargs: seen.append(kwargs["name"]))
    monkeypatch.setattr(trackio, "log", lambda metrics, step: seen.append((step, metrics)))
    monkeypatch.setattr(trackio, "finish", lambda: seen.append("finished"))
    telemetry = Telemetry(tmp_path / ".", 10, "steps", track=True)
    telemetry.log(1, loss=0.5, sample="text")
    telemetry.close()
    assert seen == [tmp_path.name, (1, {"step": 1, "loss": 0.5}), "finished"]


def test_a_terminal_shows_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    telemetry = Telemetry(tmp_path, 4, "steps")
    telemetry.log(2, loss=0.5)
    telemetry.note("half-way")
    telemetry.close()
    shown = capsys.readouterr().err
    assert "half-way" in shown
    assert "50%" in shown


def test_metrics_are_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kl": Infinity}\n{"step": 2, "kl": NaN}\n')  # of an earlier version
    telemetry = Telemetry(tmp_path, 10, "steps", resume_step=2)
    telemetry.log(3, kl=float("inf"), per_layer=[1.0, float("nan")], loss=-math.inf)
    telemetry.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [line["kl"] for line in lines] == ["inf", "nan", "inf"]
    assert lines[2] == {"step": 3, "kl": "inf", "per_layer": [1.0, "nan"], "loss": "-inf"}


def test_metrics_that_were_damaged_are_kept_beside(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    was = '{"step": 1, "loss": 2.0}\n\x00\x00garbage\n[1]\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo'
    path.write_text(was)
    Telemetry(tmp_path, 10, "steps", resume_step=2).close()
    assert (tmp_path / "metrics.damaged.jsonl").read_text() == was
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("loss") for line in lines] == [2.0, 1.0, None]
    assert "2 lines were not JSON" in lines[2]["note"]
    assert "metrics.damaged.jsonl" in capsys.readouterr().err


def test_a_full_disk_is_told_also_while_closing(tmp_path):
    telemetry = Telemetry(tmp_path, 10, "steps")
    telemetry.file.close()
    telemetry.file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(the disk is full\); .*--resume"):
        telemetry.log(1, loss=1.0)
    telemetry.close()  # does not put an error of its own in the place of that one


def start(recipe, resume=False):
    with open_run(recipe, resume) as run_dir:
        return run_dir


@pytest.mark.parametrize("resume", [False, True])
def test_a_start_that_failed_blocks_nothing(make_recipe, resume):
    with open_run(make_recipe(), False) as run_dir:  # and then the corpus, say, is not found
        (run_dir / "tokenizer").mkdir()  # of this recipe's vocabulary
        (run_dir / "data").mkdir()
    assert start(make_recipe(), resume) == run_dir
    assert (run_dir / "tokenizer").is_dir()
    start(make_recipe(tokenizer__vocab_size=400), resume)
    assert not (run_dir / "tokenizer").exists()
    assert tomllib.loads((run_dir / "recipe.toml").read_text())["tokenizer"]["vocab_size"] == 400


WORK = ["checkpoints/step-3", "checkpoints/damaged-step-3", "model/config.json", "student/x", "samples.jsonl",
        "samples.partial.jsonl", "ledger.json"]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [("out", "7"), ("out", '["runs"]'), ("dtype", "3"), ("dtype", '"float8"')])
def test_a_recipe_of_a_run_with_a_field_of_another_type(make_recipe, field, value):
    run_dir = start(make_recipe())
    (run_dir / "checkpoints" / "step-1").mkdir(parents=True)
    saved = run_dir / "recipe.toml"
    saved.write_text(re.sub(rf"^{field} = .*$", f"{field} = {value}", saved.read_text(), count=1, flags=re.MULTILINE))
    message = rf"recipe.toml is damaged \((model\.)?{field} = {re.escape(value)}\); restore it"
    with pytest.raises(UserError, match=message):
        start(make_recipe(), resume=True)


def test_a_run_from_before_a_field_existed_goes_on_with_the_fields_default(make_recipe):
    run_dir = start(make_recipe())
    (run_dir / "checkpoints" / "step-1").mkdir(parents=True)
    saved = run_dir / "recipe.toml"
    whole = saved.read_text()
    older = re.sub(r"^(moments|stochastic_rounding|betas|micro_batch) = .*\n", "", whole, flags=re.MULTILINE)
    older = re.sub(r"^\[balance\]\n(.+\n)*", "", older, flags=re.MULTILINE)
    assert len(older.splitlines()) <= len(whole.splitlines()) - 7
    for changed, was, now in (
        ({"optimizer__moments": "8bit"}, '"float32"', '"8bit"'),
        ({"optimizer__betas": [0.9, 0.99]}, r"\[0.9, 0.95\]", r"\[0.9, 0.99\]"),
        ({"balance__bias_speed": 0.5}, "0.001", "0.5"),
    ):
        saved.write_text(older)
        field = next(iter(changed)).replace("__", ".")
        with pytest.raises(UserError, match=f"{field} was {was} and is {now} now; a resumed run must keep its recipe"):
            start(make_recipe(**changed), resume=True)
    assert start(make_recipe(), resume=True) == run_dir
    assert saved.read_text() == whole
    saved.write_text(whole.replace('moments = "float32"', 'moments = "bfloat16"'))
    with pytest.raises(UserError, match=r'optimizer.moments was "bfloat16" and is "float32" now'):
        start(make_recipe(), resume=True)


@pytest.mark.parametrize("name", WORK)
def test_a_run_that_did_something_is_protected(make_recipe, name):
    run_dir = start(make_recipe())
    (run_dir / name).parent.mkdir(exist_ok=True)
    (run_dir / name).write_text("something")
    with pytest.raises(UserError, match="already holds a run; continue it with --resume or choose another name"):
        start(make_recipe())
    with pytest.raises(UserError, match=r"tokenizer.vocab_size was 300 and is 400 now"):
        start(make_recipe(tokenizer__vocab_size=400), resume=True)
    (run_dir / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
    assert start(make_recipe(), resume=True) == run_dir
    (run_dir / "recipe.toml").unlink()
    with pytest.raises(UserError, match=r"recipe.toml cannot be read"):
        start(make_recipe(), resume=True)


@pytest.mark.parametrize("name", ["model/config.json", "ledger.json"])
def test_a_run_that_has_ended_is_not_trained_again_because_its_checkpoints_are_gone(make_recipe, name):
    run_dir = start(make_recipe())
    (run_dir / name).parent.mkdir(exist_ok=True)
    (run_dir / name).write_text("something")
    for _ in range(2):
        with pytest.raises(UserError, match=r"has ended .* has no checkpoints to continue from; restore checkpoints/"):
            start(make_recipe(), resume=True)
        (run_dir / "checkpoints").mkdir(exist_ok=True)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["checkpoints", "model", "student", "samples.jsonl"])
def test_a_link_to_a_disk_that_is_absent_is_named(make_recipe, tmp_path, name, resume):
    run_dir = start(make_recipe())
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    (run_dir / name).symlink_to(tmp_path / "disk")
    with pytest.raises(UserError, match=rf"{name} is a link to .*disk, which does not exist; mount its disk, or"):
        start(make_recipe(), resume)
    assert (run_dir / "metrics.jsonl").stat().st_size


def test_a_run_folder_that_is_a_link_to_nowhere(make_recipe, tmp_path):
    run_dir = make_recipe().run_dir
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    run_dir.symlink_to(tmp_path / "disk")
    with pytest.raises(UserError, match="a file, or a dangling link, has this name; move it away"):
        start(make_recipe())


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_other_files_is_not_taken(make_recipe, resume):
    run_dir = make_recipe().run_dir
    run_dir.mkdir(parents=True)
    (run_dir / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that are not a run's \(thesis.tex\); choose another name"):
        start(make_recipe(), resume)
    assert [p.name for p in run_dir.iterdir()] == ["thesis.tex"]


def test_a_run_folder_has_one_owner(make_recipe, child_environment):
    """The lock ends with its process, however that ends, and children of a process that was killed do not keep it."""
    recipe = make_recipe()
    run_dir = start(recipe)
    hold = (
        "import os, sys, time; from pathlib import Path; from rorqual.files import locked\n"
        "with locked(Path(sys.argv[1]), 'x'):\n"
        "    child = os.fork()\n"
        "    print('held', flush=True) if child else None\n"
        "    time.sleep(60)\n"
    )
    words = [sys.executable, "-c", hold, str(run_dir / ".lock")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=child_environment, start_new_session=True) as owner:
        try:
            assert owner.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match=rf"another process trains in it \(process {owner.pid}\); wait for it"):
                start(recipe, resume=True)
            owner.kill()
            owner.wait(timeout=60)
            assert start(recipe, resume=True) == run_dir  # though its child lives
        finally:
            os.killpg(owner.pid, signal.SIGKILL)


def slow_start(rank, path, fails=False):
    """What a rank finds at `path` when it is its turn; the first takes two and a half time-outs to write it."""
    mesh = build_mesh(ParallelSection(data=2, timeout=2.0))
    try:
        with first_alone(mesh):
            if rank == 0:
                if fails:
                    raise ValueError("no data")
                time.sleep(5)
                path.write_text("prepared")
            return path.read_text()
    except ValueError as e:
        return str(e)
    except UserError as e:
        return "another rank has ended" in str(e)


def test_the_first_process_may_prepare_data_for_longer_than_a_collective_takes(tmp_path):
    assert run(2, slow_start, tmp_path / "data") == ["prepared", "prepared"]


def test_others_do_not_wait_for_a_first_process_that_failed(tmp_path):
    assert run(2, slow_start, tmp_path / "data", True) == ["no data", True]
