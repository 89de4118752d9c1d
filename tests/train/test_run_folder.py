import json
import tomllib

import pytest

from rorqual.errors import UserError
from rorqual.recipe import PretrainRecipe
from rorqual.train.run import open_run, to_toml
from rorqual.train.telemetry import Telemetry


def test_a_recipe_survives_toml(make_recipe):
    recipe = make_recipe(
        model__config={"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "hidden_size": 8},
        tokenizer__special_tokens=["<think>", 'a "quoted" one', "é"],
        train__batch_ramp=[2, 0.25],
    )
    assert PretrainRecipe.model_validate(tomllib.loads(to_toml(recipe.model_dump()))) == recipe


def test_keys_that_need_quotes():
    values = {"a b": {"c.d": [1, 2.5, True, "x"]}, "list": [{"x": 1}, {"y": {"z": 2}}], "empty": []}
    assert tomllib.loads(to_toml(values)) == values


def test_a_place_that_cannot_be_written(make_recipe, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot be written .*set out to a writable place"):
        open_run(make_recipe(), resume=False)


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
