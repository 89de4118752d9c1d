"""`rorqual r1` with small recipes: a cold start, reinforcement learning, rejection sampling, evaluations."""

import copy
import json
import os
import shutil
import signal
from pathlib import Path
from random import Random

import pytest
import torch
from typer.testing import CliRunner

from helpers.scripted_teacher import GOOD, Teacher
from rorqual.checkpoint.huggingface import save_model
from rorqual.cli import plan_stages
from rorqual.cli.entry import app
from rorqual.cli.plan_stages import plan_files
from rorqual.data.tokenizer import train_tokenizer
from rorqual.engine import Engine
from rorqual.errors import Stopped, UserError
from rorqual.model import ModelConfig, Transformer
from rorqual.pipeline import evaluation, run_pipeline
from rorqual.pipeline import run as pipeline_run
from rorqual.pipeline.evaluation import EvaluateSection, Evaluations
from rorqual.plan.cost import parameters
from rorqual.plan.pipeline_file import pipeline_at, read_pipeline
from rorqual.recipe import DistillRecipe, RLRecipe, TokenizerSection, load_recipe
from rorqual.rl import distillation
from rorqual.rl.envs.registry import open_environment
from rorqual.train.build_model import model_config

RECIPES = Path(__file__).parents[2] / "recipes"

SUMS = """
[[environments]]
name = "chain_sum"
config = { min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1 }
"""
COLD = f"""
kind = "distill"
name = "cold"
teacher = "worked-solutions"
template = "plain"
problems = 12
sequence_length = 256
[model]
path = "START"
{SUMS}
[train]
steps = 2
batch_size = 2
"""
TUNE = f"""
kind = "rl"
name = "tune"
template = "plain"
steps = 2
save_every = 1
[model]
path = "elsewhere"
{SUMS}
[grpo]
group_size = 2
questions_per_step = 2
max_tokens = 8
"""
STUDENT = f"""
kind = "distill"
name = "student"
teacher = "elsewhere"
template = "plain"
problems = 4
max_tokens = 16
sequence_length = 256
[tokenizer]
path = "START"
[model.config]
hidden_size = 32
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
n_routed_experts = 4
n_shared_experts = 1
num_experts_per_tok = 2
moe_intermediate_size = 16
first_k_dense_replace = 1
tie_word_embeddings = true
{SUMS}prompt = "{{expression}}"
[[mix]]
path = "elsewhere.jsonl"
[train]
steps = 2
batch_size = 2
"""
PIPELINE = """
name = "tiny"
out = "OUT"
[[stage]]
recipe = "cold.toml"
[[stage]]
name = "again"
recipe = "tune.toml"
model = "cold"
[evaluate]
tasks = "chain_sum"
start = "START"
problems = 3
samples = 2
template = "plain"
max_tokens = 8
"""


@pytest.fixture(scope="module")
def tokenizer():
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    return train_tokenizer(["1 + 2 = 3"], TokenizerSection(vocab_size=300, special_tokens=tags, whole_numbers=20))


@pytest.fixture(scope="module")
def dense(tokenizer):
    config = ModelConfig.from_dict(
        {
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 512, "tie_word_embeddings": True, "eos_token_id": tokenizer.eos_token_id,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    return Transformer(config)


@pytest.fixture
def file(tmp_path, tokenizer, dense):
    """Of the pipeline, in a folder with its recipes and the model that it begins with."""
    save_model(dense, tmp_path / "start", tokenizer)
    for name, text in (("cold", COLD), ("tune", TUNE), ("student", STUDENT), ("tiny", PIPELINE)):
        text = text.replace("START", str(tmp_path / "start")).replace("OUT", str(tmp_path / "runs"))
        (tmp_path / f"{name}.toml").write_text(text)
    return tmp_path / "tiny.toml"


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_pipeline_from_its_start_to_the_card(file, tmp_path, capsys):
    out = run_pipeline(file)
    assert out == tmp_path / "runs"
    summary = json.loads((out / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["start", "cold", "again"]
    assert all(0 <= stage["tasks"]["chain_sum"]["pass_at_1"] <= 1 for stage in summary["stages"])
    assert set(summary["gains"]) == {"cold", "again"}
    assert "cold, chain_sum: 12 of 12 completions kept" in summary["notes"]
    tuned = (out / "again" / "recipe.toml").read_text()
    assert f'path = "{out}/cold/student/model"' in tuned  # in place of "elsewhere"
    assert weights(out / "model") == weights(out / "again" / "model")
    card = (out / "model" / "README.md").read_text()
    assert "| cold | rejection sampling, then fine-tuning | 12 of 12 completions of worked-solutions |" in card
    assert "| again over start, paired by problem | " in card
    assert "| again over cold, paired by problem | " in card  # against fine-tuning alone
    printed = capsys.readouterr().out
    assert [pair in printed for pair in ("cold over start", "again over start", "again over cold")] == [True] * 3
    page = (out / "report.html").read_text()
    assert page.index("<h2>Cold") < page.index("<h2>Again")


def test_a_stopped_pipeline_goes_on_to_the_same_weights(file, tmp_path, monkeypatch):
    whole = run_pipeline(file, out=tmp_path / "whole", seed=3)

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    ran = []
    for kind, run in dict(pipeline_run.RUNS).items():
        monkeypatch.setitem(
            pipeline_run.RUNS, kind, lambda *a, kind=kind, run=run, **k: ran.append(kind) or run(*a, **k)
        )
    with monkeypatch.context() as patch:
        patch.setitem(pipeline_run.RUNS, "rl", killed)
        with pytest.raises(Killed):
            run_pipeline(file, out=tmp_path / "cut", seed=3)
    with pytest.raises(UserError, match=r"cut already holds stage cold; continue with --resume or"):
        run_pipeline(file, out=tmp_path / "cut", seed=3)
    cut = run_pipeline(file, out=tmp_path / "cut", seed=3, resume=True)
    assert ran == ["distill", "rl"]  # the first stage once
    assert weights(cut / "model") == weights(whole / "model")
    with pytest.raises(UserError, match=r"stage cold has ended with another recipe"):
        run_pipeline(file, out=tmp_path / "cut", seed=4, resume=True)


def test_a_reward_model_judges_a_later_stage(file, tmp_path):
    """The reward stage is not evaluated, its accuracy is in the card, and the released model is the last stage's."""
    prompts = [{"prompt": f"Talk of {word}."} for word in ("ants", "bees", "cats", "dogs", "elks", "foxes", "gnus")]
    (tmp_path / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts * 3))
    pairs = [row | {"chosen": "1 2 3", "rejected": "a b"} for row in prompts]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "judge.toml").write_text(
        f'kind = "reward"\nname = "judge"\nmodel.path = "elsewhere"\ndata.path = "{tmp_path}/pairs.jsonl"\n'
        "data.sequence_length = 64\ntrain = { steps = 2, batch_size = 2 }\n"
    )
    tune = (tmp_path / "tune.toml").read_text()
    talk = f'[[environments]]\nname = "talk"\nopen = true\npath = "{tmp_path}/open.jsonl"\n'
    reward = '[reward]\nmodel = { path = "elsewhere" }\n'
    (tmp_path / "tune.toml").write_text(tune.replace("[grpo]", talk + reward + "[grpo]"))
    stage = '[[stage]]\nrecipe = "judge.toml"\nmodel = "cold"\n'
    text = file.read_text().replace('[[stage]]\nname = "again"', stage + '[[stage]]\nname = "again"')
    file.write_text(text.replace('model = "cold"\n[eval', 'model = "cold"\nreward_model = "judge"\n[eval'))
    out = run_pipeline(file)
    assert f'path = "{out}/judge/model"' in (out / "again" / "recipe.toml").read_text()
    assert weights(out / "model") == weights(out / "again" / "model")
    assert not (out / "evaluations" / "judge.json").exists()
    summary = json.loads((out / "summary.json").read_text())
    (note,) = [note for note in summary["notes"] if note.startswith("judge: ")]
    assert note.endswith("held-out pairs right")
    assert f"| judge | reward model | {note.removeprefix('judge: ')} |" in (out / "model" / "README.md").read_text()
    assert "<h2>Judge" in (out / "report.html").read_text()
    assert len(plan_files([str(file)], {"gpu": "cpu"}, None).stages) == 3
    moved = file.read_text().replace("/runs", "/planned")  # nothing of it is written
    file.write_text(moved)
    assert [stage.name for stage in plan_files([str(file)], {"gpu": "cpu"}, None).stages] == ["cold", "judge", "again"]


def test_a_stage_goes_on_with_the_model_of_a_directory(file):
    file.write_text(file.read_text().replace('model = "cold"', 'model = "runs/other/model"'))
    assert "model.path=runs/other/model" in read_pipeline(file).stages[1].overrides


def test_reward_models_alone_are_no_pipeline(tmp_path):
    (tmp_path / "judge.toml").write_text(
        'kind = "reward"\nname = "judge"\nmodel.path = "m"\ndata.path = "p.jsonl"\ntrain.steps = 1\n'
    )
    (tmp_path / "only.toml").write_text(f'out = "{tmp_path}/runs"\n[[stage]]\nrecipe = "judge.toml"\n')
    with pytest.raises(UserError, match=r"all stages train reward models, so there is no model to release"):
        run_pipeline(tmp_path / "only.toml")


WITH_STUDENT = """
[[stage]]
recipe = "student.toml"
teacher = "again"
mix = ["cold"]
[evaluate]
"""


@pytest.fixture
def with_student(file, tokenizer, monkeypatch):
    """The pipeline with a student at its end, whose teacher answers as a script says."""
    file.write_text(file.read_text().replace("[evaluate]", WITH_STUDENT))
    asked = []

    def teacher(path, device):
        asked.append(path)
        return Teacher(tokenizer, [GOOD])

    monkeypatch.setattr(distillation, "Engine", teacher)
    return file, asked


def test_a_student_stands_beside_the_tuned_model(with_student, tmp_path, capsys):
    file, asked = with_student
    out = run_pipeline(file)
    assert asked == [str(out / "again" / "model")]  # in place of "elsewhere"
    assert json.loads((out / "student" / "sampling.json").read_text())["mixed in"] == 12  # the cold start's
    assert weights(out / "model") == weights(out / "again" / "model")
    assert weights(out / "student" / "student" / "model") != weights(out / "model")
    summary = json.loads((out / "summary.json").read_text())
    assert [stage.get("student", False) for stage in summary["stages"]] == [False, False, False, True]
    assert set(summary["gains"]) == {"cold", "again", "student"}
    assert f"student is a student: its model is {out}/student/student/model" in summary["notes"]
    card = (out / "model" / "README.md").read_text()
    assert "The model of stage student is not this one but a student beside it, of random weights at its start" in card
    assert f"`{out}/student/student/model`" in card
    rows = [line.split(" | ")[0] for line in card.splitlines() if "paired" in line]
    assert rows == [
        f"| {pair}, paired by problem"
        for pair in ("again over start", "student over start", "again over cold", "student over again")
    ]
    printed = capsys.readouterr().out
    assert "student over start" in printed
    engine = Engine(out / "student" / "student" / "model")
    assert engine.model.config.model_type == "deepseek_v3"


def test_an_evaluation_is_kept_for_the_model_it_is_of(tmp_path, tokenizer, dense, monkeypatch):
    """Neither a copy of the model nor another place makes it another model; other weights or another template do."""
    section = EvaluateSection(tasks="chain_sum", problems=2, samples=1, template="plain", max_tokens=4)
    evaluations = Evaluations(tmp_path / "evaluations", section)
    evaluated = []
    evaluate = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: evaluated.append(1) or evaluate(*a, **k))
    save_model(dense, tmp_path / "start", tokenizer)
    first = evaluations.of("start", tmp_path / "start")
    shutil.copytree(tmp_path / "start", tmp_path / "moved")
    assert evaluations.of("start", tmp_path / "moved") == first
    assert len(evaluated) == 1
    (tmp_path / "moved" / "chat_template.jinja").write_text("another")
    evaluations.of("start", tmp_path / "moved")
    assert len(evaluated) == 2
    other = copy.deepcopy(dense)
    other.head_weight.data.mul_(0.5)
    save_model(other, tmp_path / "moved", tokenizer)
    evaluations.of("start", tmp_path / "moved")
    assert len(evaluated) == 3
    (tmp_path / "evaluations" / "start.json").write_text(
        (tmp_path / "evaluations" / "start.json").read_text().replace("by_difficulty", "by_level")
    )
    with pytest.raises(UserError, match=r"start\.json is damaged \('by_difficulty'\); delete it"):
        evaluations.of("start", tmp_path / "moved")


def test_a_stopped_evaluation_goes_on(tmp_path, tokenizer, dense, monkeypatch):
    """What was answered before the stop is not sampled again, and the results are those of an undisturbed one."""
    section = EvaluateSection(tasks="chain_sum,simple_equations", problems=2, samples=1, template="plain", max_tokens=4)
    save_model(dense, tmp_path / "start", tokenizer)
    whole = Evaluations(tmp_path / "whole", section).of("start", tmp_path / "start")
    generate, asked = Engine.generate, []

    def stopped(engine, *args, **options):
        asked.append(1)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(engine, *args, **options)

    monkeypatch.setattr(Engine, "generate", stopped)
    with pytest.raises(Stopped, match="stopped by SIGTERM amid an evaluation"):
        Evaluations(tmp_path / "cut", section).of("start", tmp_path / "start")
    assert Evaluations(tmp_path / "cut", section).of("start", tmp_path / "start") == whole
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", r"pipeline\.json is damaged"),
        ("[]", r"pipeline\.json is damaged \(no object\)"),
        ('{"cold": {"recipe": "x"}}', r"pipeline\.json is damaged \(stage cold lacks its recipe or seconds\)"),
        ('{"cold": 3}', r"pipeline\.json is damaged \(stage cold lacks its recipe or seconds\)"),
    ],
)
def test_a_damaged_state_is_told(file, tmp_path, text, sentence):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "pipeline.json").write_text(text)
    with pytest.raises(UserError, match=sentence):
        run_pipeline(file, resume=True)


def test_a_dry_run_honours_out_and_seed(with_student, tmp_path, monkeypatch):
    """All stages are planned where and as they would run; nothing is written."""
    file, _ = with_student
    file.write_text(file.read_text().replace(f'out = "{tmp_path}/runs"\n', ""))
    planned = []
    load = plan_stages.load_recipe
    monkeypatch.setattr(plan_stages, "load_recipe", lambda *a: planned.append(load(*a)) or planned[-1])
    result = CliRunner().invoke(app, ["r1", str(file), "--dry-run", "--out", str(tmp_path / "there"), "--seed", "7"])
    assert result.exit_code == 0, result.output
    assert [recipe.seed for recipe in planned] == [7, 1007, 2007]
    assert [recipe.run_dir for recipe in planned] == [
        tmp_path / "there" / name for name in ("cold", "again", "student")
    ]
    assert planned[2].mix[0].path == str(tmp_path / "there" / "cold" / "samples.jsonl")
    assert not (tmp_path / "there").exists()


def test_prompts_are_counted_by_the_tokenizer_of_the_first_model(with_student, monkeypatch):
    """Of the sampling stage, whose teacher has yet to be written."""
    file, _ = with_student
    counted = []
    monkeypatch.setattr(plan_stages, "answers_seconds", lambda asked, teacher: counted.append(asked) or 5.0)
    stage = plan_files([str(file)], {}, None).stages[2]
    assert (stage.kind, stage.parts["sampling"]) == ("distill", 5.0)
    (asked,) = counted
    assert 4 < asked.prompt < 50
    assert asked.prompt != plan_stages.WRITTEN_PROMPT
    with pytest.raises(UserError, match="--weights: a recipe on this machine is planned as it is"):
        plan_files([str(file)], {"weights": "int4"}, None)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('model = "cold"', 'model = "warm"', r"tiny\.toml: stage 2: model = 'warm' is no stage before it \(cold\)"),
        ('name = "again"', 'name = "cold"', r"stage 2: a stage before is named 'cold' too"),
        (
            'model = "cold"',
            'modle = "cold"',
            r"tiny\.toml: stage 2: field modle is unknown; known are recipe, name, model",
        ),
        (
            'model = "cold"',
            'mix = ["again"]',
            r"tiny\.toml: stage 2: mix = 'again' is no distillation before it \(cold\)",
        ),
        ("[[stage]]", "[stages]", r"tiny\.toml has no \[\[stage\]\], so it is no pipeline's file"),
        ("problems = 3", "problems = 0", r"tiny\.toml: evaluate\.problems: input should be greater than"),
        ('recipe = "cold.toml"', 'for = "pretrain"', r"stage 1: it has no recipe, so it can be planned only"),
        ('recipe = "cold.toml"', 'recipe = "none.toml"', r"none\.toml does not exist"),
    ],
)
def test_a_fault_is_told_before_anything_starts(file, tmp_path, old, new, sentence):
    text = file.read_text().replace(old, new, 1)
    if new == "[stages]":
        text = text.partition("[[stage]]")[0]  # only one table of that name
    if "for = " in new:
        text = text.replace('model = "cold"\n', "")
    file.write_text(text)
    with pytest.raises(UserError, match=sentence):
        run_pipeline(file)
    assert not (tmp_path / "runs").exists()


def test_the_stock_room_is_a_pipeline_whose_worked_episodes_are_right(monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    stages = read_pipeline(RECIPES / "stockroom.toml").stages
    cold, tuned = (
        load_recipe(s.recipe, k, s.overrides) for s, k in zip(stages, (DistillRecipe, RLRecipe), strict=True)
    )
    assert tuned.model.path == str(cold.run_dir / "student" / "model")
    environment = open_environment(cold.environments[0])
    for problem in environment.problems("train", 5, 0):
        episode = environment.worked(problem, Random(0))
        assert environment.grade(episode) == (1.0, True)
        assert [message["role"] for message in episode.turns] == ["assistant", "tool", "assistant"]


def test_the_student_of_the_recipe_is_small_and_knows_its_stages():
    file, out = pipeline_at(RECIPES / "r1-smollm2.toml", Path("there"))
    last = file.stages[-1]
    recipe = load_recipe(last.recipe, DistillRecipe, last.overrides)
    total, active = parameters(model_config(recipe.model, vocab_size=49152, length=recipe.sequence_length))
    assert total == 28_926_464  # as the recipe's comments say
    assert round(active / 1e6, 1) == 17.2
    assert recipe.teacher == str(out / "all-rl" / "model")
    mixed = [str(out / name / "samples.jsonl") for name in ("cold-start", "rejection-sampling")]
    assert [section.path for section in recipe.mix] == mixed
    before = load_recipe(RECIPES / "r1-smollm2" / "rejection-sampling.toml", DistillRecipe)
    assert recipe.environments == [e for e in before.environments if not e.open]
    assert recipe.filter == before.filter
