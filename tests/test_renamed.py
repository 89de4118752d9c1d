"""Old names of modules, options, recipe fields and metrics are accepted, with a warning that names the new one."""

import importlib
import warnings

import pytest

from rorqual import renamed
from rorqual.recipe import RLRecipe, parse_recipe
from rorqual.renamed_modules import MODULES

BARE = {"sandbox.namespaces", "sandbox.audit_hook"}  # scripts for a bare interpreter, imported by nobody


@pytest.mark.parametrize("old", [old for old, new in MODULES.items() if new not in BARE])
def test_an_old_module_holds_the_same_objects(old):
    with pytest.warns(DeprecationWarning, match=f"rorqual.{old} is now rorqual.{MODULES[old]}$"):
        before = importlib.reload(importlib.import_module(f"rorqual.{old}"))
    now = importlib.import_module(f"rorqual.{MODULES[old]}")
    for name in ("__all__", *vars(now)):
        if not name.startswith("__"):
            assert getattr(before, name) is getattr(now, name)


def test_nothing_of_ours_imports_an_old_module():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        importlib.import_module("rorqual.cli.entry")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("serve m --slots 4", "serve m --max-num-seqs 4", "--slots is now --max-num-seqs"),
        ("serve m --waiting=2", "serve m --max-queue=2", "--waiting is now --max-queue"),
        ("chat m --speculate lookup", "chat m --speculative ngram", "--speculative lookup is now --speculative ngram"),
        ("chat m --speculative=lookup", "chat m --speculative=ngram", "--speculative lookup"),
        ("generate m -- --slots", "generate m -- --slots", ""),
        ("generate m lookup", "generate m lookup", ""),
    ],
)
def test_an_old_option(capsys, old, new, named):
    assert renamed.current_options(old.split()) == new.split()
    said = capsys.readouterr().err
    assert (named in said) if named else not said


def test_an_old_field_of_a_recipe(capsys):
    raw = {
        "name": "a", "steps": 1, "model": {"path": "m"}, "environments": [{"name": "countdown"}],
        "grpo": {"rollout_slots": 3},
    }  # fmt: skip
    assert parse_recipe(raw, RLRecipe).grpo.rollout_max_num_seqs == 3
    assert "grpo.rollout_slots is now grpo.rollout_max_num_seqs" in capsys.readouterr().err


def test_an_old_metric():
    assert renamed.current_metrics({"step": 1, "flat_groups": 0.5}) == {"step": 1, "zero_std_groups": 0.5}
