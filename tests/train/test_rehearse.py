import pytest

from rorqual.errors import UserError
from rorqual.plan.rehearsal import TrainingRehearsal, keep_rehearsal
from rorqual.train.dry_run import dry_run
from rorqual.train.rehearse import rehearse
from rorqual.train.training_run import pretrain


def test_steps_are_of_the_recipes_size(make_recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("RORQUAL_CALIBRATION", str(tmp_path / "calibration.json"))
    recipe, said = make_recipe(train__steps=1000), []
    found = rehearse(recipe, 3, say=said.append)
    assert found.tokens == recipe.train.batch_size * recipe.data.sequence_length
    assert len(found.seconds) == len(said) == 3
    assert not recipe.run_dir.exists()
    keep_rehearsal(recipe, found)
    plan = dry_run(make_recipe(train__steps=50))  # of another length
    assert plan["tokens_per_second"] == found.tokens_per_second == found.tokens / (sum(found.seconds[1:]) / 2)
    assert plan["calibration"].startswith("rehearsed in 3 steps")
    assert dry_run(make_recipe(train__batch_size=7))["calibration"].startswith("not calibrated")


def test_a_run_after_it_is_predicted_from_it(make_recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("RORQUAL_CALIBRATION", str(tmp_path / "calibration.json"))
    recipe = make_recipe(train__steps=2)
    keep_rehearsal(recipe, TrainingRehearsal(100.0, (1.0, 4.0, 4.0)))
    assert '"tokens_per_second": 25.0,' in (pretrain(recipe) / "plan.json").read_text()


def test_what_cannot_be_rehearsed(make_recipe):
    with pytest.raises(UserError, match="--rehearse 0"):
        rehearse(make_recipe(), 0)
    with pytest.raises(UserError, match="parallel of 2 processes"):
        rehearse(make_recipe(parallel__data=2))
