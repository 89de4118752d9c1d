"""What a recipe may say, and the sentence for what it may not."""

import codecs
import copy
import datetime
from typing import get_args

import pytest

from rorqual.errors import UserError
from rorqual.precision.formats import PRECISIONS
from rorqual.precision.recompute import Recompute
from rorqual.recipe import DistillRecipe, PretrainRecipe, RewardSection, RLRecipe, SFTRecipe, load_recipe, parse_recipe
from rorqual.rl.rewards import SCRIPTS
from rorqual.sections import PrecisionName, RecomputeName

TRAIN = {"steps": 3}
BASE = {
    "pretrain": {
        "name": "r", "model": {"config": {"hidden_size": 16}}, "data": {"sources": [{"path": "t.txt"}]}, "train": TRAIN,
    },
    "sft": {"name": "r", "model": {"path": "m"}, "data": {"path": "c.jsonl"}, "train": TRAIN},
    "rl": {"name": "r", "model": {"path": "m"}, "environments": [{"name": "a"}], "steps": 5},
    "distill": {
        "name": "r", "teacher": "t", "model": {"path": "m"}, "environments": [{"name": "a"}], "train": TRAIN,
    },
}  # fmt: skip
KINDS = {"pretrain": PretrainRecipe, "sft": SFTRecipe, "rl": RLRecipe, "distill": DistillRecipe}
NAN, INF = float("nan"), float("inf")


def changed(kind, field, value):
    raw = copy.deepcopy(BASE[kind])
    here = raw
    *parents, last = field.split(".")
    for name in parents:
        here = here[int(name)] if isinstance(here, list) else here.setdefault(name, {})
    here[last] = value
    return raw


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        ("pretrain", "optimizer.betas", ([0.9, 9.5], [9, 0.95], [0.9, 1.0], [-0.1, 0.95], [0.9], [NAN, 0.9], "ab")),
        ("pretrain", "optimizer.lr", (0, -1.0, NAN, INF, 10**400, "1e-3", True)),
        ("pretrain", "optimizer.eps", (0, 1e-300, NAN, 2.0)),
        ("pretrain", "optimizer.clip", (0, INF)),
        ("pretrain", "optimizer.moments", ("float16", "8-bit", 8)),
        ("pretrain", "optimizer.weight_decay", (-0.1, NAN, 1e6)),
        ("pretrain", "schedule.warmup", (-0.1, 1.1, NAN, 0.9)),  # 0.9 and wsd's decay of 0.2 are longer than the run
        ("pretrain", "schedule", ({"name": "v3", "warmup": 0.7},)),
        ("pretrain", "mtp.weight", (-1, INF)),
        ("pretrain", "mtp.switch_at", (2, NAN)),
        ("pretrain", "balance.bias_speed", (-1, INF)),
        ("pretrain", "data.valid_fraction", (1.0, -0.1, NAN)),
        ("pretrain", "data.sequence_length", (1, 2**30, 256.0)),
        ("pretrain", "data.sources.0.weight", (0, NAN, INF)),
        ("pretrain", "data.sources.0.path", ("", "a\0b", "~nobodys-name/t.txt", "$NO_SUCH_NAME/t.txt")),
        ("pretrain", "train.batch_ramp", ([0, 0.5], [2, NAN], [2, 0.0], [2, 1.5], [9, 0.5], [2])),
        ("pretrain", "train.batch_size", (0, 2**30, True, "8", 8.0)),
        ("pretrain", "train.steps", (0, 10**20, True, "8", 8.0)),
        ("pretrain", "train.epochs", (3,)),  # beside steps
        ("pretrain", "train.ema", (0, 1, NAN)),
        ("pretrain", "model.config", ({"a": NAN}, {"a": [{"b": datetime.date(2026, 1, 1)}]})),
        ("pretrain", "seed", (-1, 2**63, True, 1.0)),
        ("pretrain", "name", ("", "..", "a/b", "a\n", "a" * 300)),
        ("pretrain", "out", ("", "${NO_SUCH_NAME}")),
        ("sft", "train", ({"seconds": NAN}, {"seconds": INF}, {"epochs": 0}, {})),
        ("rl", "environments", ([], [{"name": "a"}, {"name": "a", "weight": 2}], [{"name": " "}])),
        ("rl", "environments.0.config", ({"a": INF}, {"a": {"b": datetime.time(1, 2)}})),
        ("rl", "reward", ({"accuracy": 0, "format": 0}, {"accuracy": -1}, {"format": NAN}, {"target_language": "xx"})),
        ("rl", "grpo", ({"mini_batches": 33}, {"clip_low": 1.0}, {"kl": NAN}, {"temperature": 0}, {"group_size": 1})),
        ("rl", "warmup_steps", (6, -1)),
        ("rl", "seconds", (5,)),  # beside steps
        ("rl", "decay", (NAN, 1.5)),
        ("distill", "keep_per_problem", (9,)),
        ("distill", "temperature", (NAN, 0, 1e-300, 1e300)),
        ("distill", "teacher", ("", "$NO_SUCH_NAME")),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_with_the_fields_name(kind, field, values):
    for value in values:
        with pytest.raises(UserError) as error:
            parse_recipe(changed(kind, field, value), KINDS[kind], "mine.toml")
        text = str(error.value)
        assert text.startswith("mine.toml: "), text
        named = field.rpartition(".")[2] in text or (isinstance(value, dict) and all(k in text for k in value))
        assert named or field.endswith("path") or field in ("out", "teacher", "train", "data"), text
        assert len(text) < 400


def test_a_section_given_in_part_keeps_its_kinds_defaults():
    sft = parse_recipe(changed("sft", "optimizer", {"weight_decay": 0.0}), SFTRecipe)
    assert (sft.optimizer.lr, sft.schedule.name, sft.schedule.final) == (1e-5, "cosine", 0.1)
    rl = parse_recipe(changed("rl", "optimizer", {"lr": 2e-5}), RLRecipe)
    assert (rl.optimizer.lr, rl.optimizer.weight_decay) == (2e-5, 0.0)
    assert parse_recipe(changed("rl", "balance", {"bias_stop_at": 0.5}), RLRecipe).balance.bias_speed == 0.0
    assert parse_recipe(changed("distill", "schedule", {"warmup": 0.1}), DistillRecipe).schedule.final == 0.1


def test_a_recipe_by_its_kind(tmp_path):
    raw = {"name": "a", "model": {"path": "m"}, "data": {"path": "d.jsonl"}, "train": {"steps": 1}}
    assert type(parse_recipe(raw, "sft")) is SFTRecipe
    path = tmp_path / "a.toml"
    path.write_text('name = "a"\nmodel.path = "m"\ndata.path = "d.jsonl"\ntrain.steps = 1')
    assert load_recipe(path, "sft") == load_recipe(path, SFTRecipe)
    with pytest.raises(UserError, match="there is no recipe for 'tune'; known are pretrain, sft, reward, rl, distill"):
        parse_recipe(raw, "tune")


def test_precisions_and_recomputation_are_those_there_are():
    assert set(get_args(PrecisionName)) == set(PRECISIONS)
    assert get_args(RecomputeName) == get_args(Recompute)


@pytest.mark.parametrize("field", [{"precision": "fp8"}, {"recompute": "v3"}, {"parallel": {"data": 2}}])
def test_torch_compile_takes_no_rounded_recomputed_or_shared_layers(field):
    raw = {
        "name": "run", "model": {"config": {}}, "data": {"sources": [{"path": "x.txt"}]},
        "train": {"steps": 1, "compile": True},
    }  # fmt: skip
    parse_recipe(raw, PretrainRecipe)
    with pytest.raises(UserError, match=f"{next(iter(field))}.*: torch.compile does not take"):
        parse_recipe(raw | field, PretrainRecipe)


def test_every_language_has_a_script():
    for language in SCRIPTS:
        assert RewardSection(target_language=language).target_language == language


def test_a_home_and_variables_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    raw = {
        "name": "r", "out": "~/runs", "teacher": "$HOME/t", "model": {"path": "~/m"}, "train": TRAIN,
        "environments": [{"name": "a", "path": "${DATA}/a.jsonl"}],
    }  # fmt: skip
    recipe = parse_recipe(raw, DistillRecipe)
    assert [str(recipe.run_dir), recipe.teacher, recipe.model.path, recipe.environments[0].path] == [
        "/home/me/runs/r", "/home/me/t", "/home/me/m", "/data/a.jsonl",
    ]  # fmt: skip
    pretrain = changed("pretrain", "tokenizer.path", "~/tok") | {"data": {"sources": [{"path": "~/[ab]*.txt"}]}}
    recipe = parse_recipe(pretrain, PretrainRecipe)
    assert (recipe.tokenizer.path, recipe.data.sources[0].path) == ("/home/me/tok", "/home/me/[ab]*.txt")
    assert parse_recipe(changed("sft", "data.path", "$DATA/c.jsonl"), SFTRecipe).data.path == "/data/c.jsonl"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").mkdir()
    (tmp_path / "$DATA.txt").write_text("")
    for path in ("$DATA.txt", "cost$.txt", "~", "someone/name"):  # files of these names, and what is no variable
        assert parse_recipe(changed("sft", "data.path", path), SFTRecipe).data.path == path


TEXT = 'name = "mine"\r\nsteps = 3\r\n[model]\r\npath = "m"\r\n[[environments]]\r\nname = "a"\r\nprompt = "é"\r\n'
BIG_ENDIAN = codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be")


@pytest.mark.parametrize(
    "raw",
    [TEXT.encode(), codecs.BOM_UTF8 + TEXT.encode(), TEXT.encode("utf-16"), BIG_ENDIAN],
)  # fmt: skip
def test_recipes_as_editors_save_them(tmp_path, raw):
    path = tmp_path / "mine.toml"
    path.write_bytes(raw)
    assert load_recipe(path, RLRecipe).environments[0].prompt == "é"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (TEXT.encode("latin-1"), r"mine\.toml, line 7 is not UTF-8 text .*save the file as UTF-8"),
        (b"a = " + b"9" * 5000, "is not valid TOML"),
        (b"a = " + b"[" * 10_000, "is not valid TOML"),
        (b"\0", "is not valid TOML"),
        (None, r"mine\.toml cannot be read \(Is a directory\)"),
    ],
)
def test_unreadable_recipes(tmp_path, raw, message):
    path = tmp_path / "mine.toml"
    path.mkdir() if raw is None else path.write_bytes(raw)
    with pytest.raises(UserError, match=message):
        load_recipe(path, RLRecipe)


def test_overrides(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)

    def load(*words):
        return load_recipe(path, RLRecipe, list(words))

    assert load("environments.0.weight=2", "environments.0.config={min_terms = 2}").environments[0].weight == 2
    assert load("name=2", "steps=7").name == "2"  # what takes text gets it as it was written
    assert load("name=2026-11-28").name == "2026-11-28"
    assert load("environments.0.prompt=1 \n x = 2").environments[0].prompt == "1 \n x = 2"
    for word, message in (
        ("environments.1.weight=2", "environments has entries 0 to 0, not '1'"),
        ("environments.name=x", "environments has entries 0 to 0, not 'name'"),
        ("steps.more=2", "steps is not a section"),
        ("steps=", "steps = ''"),
        ("steps=ten", "steps = 'ten'"),
        ("stepz=2", "field stepz is unknown"),
        ("=2", "is not of the form key=value"),
        ("environments.0.prompt=\udcff", "not UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            load(word)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_rounding_by_chance_needs_bfloat16_moments(moments):
    section = {"moments": moments, "stochastic_rounding": True}
    with pytest.raises(UserError, match=f'with moments = "{moments}" nothing is rounded to bfloat16; set moments = "b'):
        parse_recipe(changed("pretrain", "optimizer", section), PretrainRecipe)
    parse_recipe(changed("pretrain", "optimizer", section | {"moments": "bfloat16"}), PretrainRecipe)
