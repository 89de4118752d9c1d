import json
import os
import shutil

import pytest

from rorqual.errors import UserError
from rorqual.recipe import DistillRecipe, PretrainRecipe, RewardRecipe, RLRecipe, SFTRecipe, parse_recipe
from rorqual.train import input_fingerprints
from rorqual.train.input_fingerprints import files_of, keep_inputs
from rorqual.train.run_folder import open_run

FILES = {
    "m/config.json": "{}", "m/model.safetensors": "weights", "m/tokenizer.json": "{}", "m/README.md": "words",
    "t/model/config.json": "{}", "t/ledger.json": "{}", "tok/tokenizer.json": "{}",
    "a.jsonl": '{"text": "a"}\n', "b.jsonl": '{"text": "b"}\n', "q.json": "[]\n",
    "set/state.json": "{}", "set/data.arrow": "rows",
}  # fmt: skip
TRAIN = {"steps": 3}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


RECIPES = {
    "pretrain": (
        {"model": {"config": {}}, "data": {"sources": [{"path": "*.jsonl"}, {"path": "set"}]}, "train": TRAIN,
         "tokenizer": {"path": "tok"}},
        ["a.jsonl", "b.jsonl", "set/data.arrow", "set/state.json", "tok/tokenizer.json"],
    ),
    "sft": (
        {"model": {"path": "m"}, "data": {"path": "a.jsonl"}, "train": TRAIN},
        ["a.jsonl", "m/config.json", "m/model.safetensors", "m/tokenizer.json"],
    ),
    "rl": (
        {"model": {"path": "t"}, "environments": [{"name": "a", "path": "b.jsonl"}, {"name": "chain_sum"}], "steps": 1},
        ["b.jsonl", "t/model/config.json"],
    ),
    "reward": (
        {"model": {"path": "m"}, "pairs": {"prompts": "b.jsonl", "model": "t"}, "train": TRAIN},
        ["b.jsonl", "m/config.json", "m/model.safetensors", "m/tokenizer.json", "t/model/config.json"],
    ),
    "judged": (
        {"model": {"path": "t"}, "environments": [{"name": "a", "path": "b.jsonl", "open": True}], "steps": 1,
         "reward": {"model": {"path": "m"}}},
        ["b.jsonl", "m/config.json", "m/model.safetensors", "m/tokenizer.json", "t/model/config.json"],
    ),
    "distill": (
        {"model": {"path": "m"}, "teacher": "t", "environments": [{"name": "a", "path": "q.json"}], "train": TRAIN},
        ["q.json", "t/model/config.json"],
    ),
}  # fmt: skip

KINDS = {
    "pretrain": PretrainRecipe, "sft": SFTRecipe, "rl": RLRecipe, "reward": RewardRecipe, "judged": RLRecipe,
    "distill": DistillRecipe,
}  # fmt: skip


def recipe(kind):
    return parse_recipe(RECIPES[kind][0] | {"name": "run"}, KINDS[kind])


def start(recipe, resume):
    with open_run(recipe, resume) as run_dir:
        return run_dir


@pytest.mark.parametrize("kind", RECIPES)
def test_every_file_of_a_recipe_is_known(here, kind):
    assert [str(path) for path in files_of(recipe(kind))] == RECIPES[kind][1]


@pytest.mark.parametrize("kind", RECIPES)
def test_changed_data_ends_a_resumed_run_and_a_touch_does_not(here, kind):
    made = recipe(kind)
    run_dir = made.run_dir
    start(made, resume=False)
    (run_dir / "checkpoints" / "step-1").mkdir(parents=True)
    for name in RECIPES[kind][1]:
        path, before = here / name, FILES[name]
        stat = path.stat()
        os.utime(path)
        start(made, resume=True)
        path.write_text(before[:-1] + "#")  # of the same size, and as old as it was
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(UserError, match=rf"{name} has changed since runs/run began"):
            start(made, resume=True)
        shutil.copy(path, here / "aside")
        path.unlink()
        path.write_text(before)
        start(made, resume=True)


def test_files_that_come_and_go(here):
    made = recipe("pretrain")
    start(made, resume=False)
    (made.run_dir / "checkpoints" / "step-1").mkdir(parents=True)
    (here / "c.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"c\.jsonl is new since"):
        start(made, resume=True)
    (here / "c.jsonl").unlink()
    (here / "a.jsonl").rename(here / "away")
    with pytest.raises(UserError, match=r"a\.jsonl is missing since"):
        start(made, resume=True)
    (here / "away").rename(here / "a.jsonl")
    start(made, resume=True)


def test_a_start_that_never_trained_binds_nobody(here):
    made = recipe("pretrain")
    assert keep_inputs(start(made, resume=False), made, begun=False)
    (here / "a.jsonl").write_text('{"text": "c"}\n')
    (made.run_dir / "tokenizer").mkdir()
    start(made, resume=True)
    assert not (made.run_dir / "tokenizer").exists()  # learnt from other text


def test_a_run_of_before_there_was_such_a_file(here):
    made = recipe("pretrain")
    run_dir = start(made, resume=False)
    (run_dir / input_fingerprints.NAME).unlink()
    (run_dir / "checkpoints" / "step-1").mkdir(parents=True)
    (run_dir / "tokenizer").mkdir()
    start(made, resume=True)
    assert (run_dir / "tokenizer").exists()
    assert len(json.loads((run_dir / input_fingerprints.NAME).read_text())) == 5


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"a": 1}', '{"a": {"size": 1}}'])
def test_a_damaged_list_is_named(here, text):
    made = recipe("pretrain")
    run_dir = start(made, resume=False)
    (run_dir / input_fingerprints.NAME).write_text(text)
    with pytest.raises(UserError, match=r"inputs\.json .*delete it to accept"):
        start(made, resume=True)


def test_what_the_system_says_is_the_same_is_not_read_again(here, monkeypatch):
    made = recipe("sft")
    run_dir = start(made, resume=False)
    monkeypatch.setattr(input_fingerprints, "file_digest", lambda *_: pytest.fail("read again"))
    assert keep_inputs(run_dir, made, begun=True)


def test_a_folder_of_runs_may_move(here):
    """A run's files that lie in it, as a student's samples do, are known at their new place, moved or copied."""
    (here / "runs" / "all").mkdir(parents=True)
    (here / "runs" / "all" / "a.jsonl").write_text(FILES["a.jsonl"])

    def student(out):
        values = {"name": "s", "out": out, "model": {"path": "m"}, "data": {"path": f"{out}/a.jsonl"}, "train": TRAIN}
        return parse_recipe(values, SFTRecipe)

    start(student("runs/all"), resume=False)
    (here / "runs" / "all" / "s" / "checkpoints" / "step-1").mkdir(parents=True)
    shutil.copytree(here / "runs", here / "copied")
    start(student("copied/all"), resume=True)
    shutil.move(here / "runs", here / "moved")
    start(student(f"{here}/moved/all"), resume=True)
    (here / "moved" / "all" / "a.jsonl").write_text("another")
    with pytest.raises(UserError, match=r"moved/all/a.jsonl has changed since"):
        start(student("moved/all"), resume=True)
    (here / "elsewhere.jsonl").write_text(FILES["a.jsonl"])
    with pytest.raises(UserError, match=r"data\.path was"):
        start(parse_recipe(student("moved/all").model_dump() | {"data": {"path": "elsewhere.jsonl"}}, SFTRecipe), True)
