"""Rewards by a reward model, of open problems: what is scored, and that metrics leave out what does not exist."""

import copy
import json
import math

import pytest
import torch

from helpers.fake_ray import FakeRay
from helpers.scripted_teacher import Teacher
from rorqual.checkpoint.huggingface import save_model
from rorqual.errors import UserError
from rorqual.evals.tasks import open_task, split_tasks
from rorqual.model.reward_model import RewardModel
from rorqual.recipe import DistillRecipe, EnvironmentSection, RewardModelSection, RewardSection, RLRecipe, parse_recipe
from rorqual.rl import distillation, reward_scorer
from rorqual.rl.envs.environment import Problem, Sample
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.ray_rollouts import RayFleet
from rorqual.rl.reward_scorer import RewardScorer, check_reward_model
from rorqual.rl.rewards import Rewards, score
from rorqual.rl.rl_run import on_ray, rl
from rorqual.rl.rollout import Rollout
from rorqual.rl.rollout_metrics import describe_rollout


@pytest.fixture
def judge(tmp_path, dense, tokenizer):
    """The folder of a random reward model."""
    torch.manual_seed(5)
    model = RewardModel.of(dense)
    model.score_mean, model.score_std = 0.5, 0.25
    save_model(model, tmp_path / "judge", tokenizer)
    return tmp_path / "judge"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "open.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Talk of {n} things."}) + "\n" for n in range(60)))
    return path


def sample(text, question="Why?", truncated=False, family="open"):
    return Sample(Problem(question, "", question, "", family), text, 5, truncated)


def loaded(judge):
    return RewardScorer.load(RewardModelSection(path=str(judge)), torch.float32, torch.device("cpu"))


def test_the_final_summary_is_scored_and_normalised(judge, tokenizer, monkeypatch):
    scorer = loaded(judge)
    texts = [
        "<think>a</think>Yes",
        "Yes",
        "<think>b</think><answer>Yes</answer>",
        "No, and for many reasons",
        "<think>",
    ]
    found = scorer([*map(sample, texts), sample("Yes", truncated=True)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)
    assert found[4:] == [0.0, 0.0]  # without a summary, or cut off
    tokens = tokenizer("<|user|>Why?<|assistant|>Yes" + tokenizer.eos_token).input_ids
    with torch.no_grad():
        raw = float(scorer.model.scores(scorer.model(torch.tensor([tokens]))[0, -1]))
    assert found[1] == pytest.approx(1 / (1 + math.exp(-(raw - 0.5) / 0.25)), rel=1e-4)
    assert scorer.flops > 0
    monkeypatch.setattr(reward_scorer, "MICRO_TOKENS", 20)  # one or two at a time
    assert scorer([*map(sample, texts)]) == pytest.approx(found[:5], rel=1e-4)


def test_parts_exist_where_they_mean_something(judge, prompts, monkeypatch):
    section = EnvironmentSection(name="open", path=str(prompts), open=True)
    ruled = EnvironmentSection(name="sums", path=str(prompts.with_name("sums.jsonl")))
    prompts.with_name("sums.jsonl").write_text('{"question": "1 + 2", "answer": "3"}\n')
    environments = {name: open_environment(s) for name, s in (("open", section), ("sums", ruled))}
    samples = [sample("<think>a</think>Yes"), sample("No"), *(sample(t, family="sums") for t in ("3", "4"))]
    sums = environments["sums"].all_problems()[0]
    samples[2:] = [Sample(sums, s.text, 5, False) for s in samples[2:]]
    weights = RewardSection(format=0.5, model=RewardModelSection(path=str(judge), weight=2.0))
    scorer = loaded(judge)
    found = score(samples, environments, weights, 10, scorer=scorer)
    helpful = scorer(samples[:2])
    assert found.parts["accuracy"].isnan().tolist() == [True, True, False, False]
    assert found.parts["helpfulness"].isnan().tolist() == [False, False, True, True]
    assert found.total.tolist() == pytest.approx([2 * helpful[0], 2 * helpful[1], 1.0, 0.0])
    assert found.mean(found.parts["accuracy"]) == 0.5
    assert found.mean(found.parts["helpfulness"]) == pytest.approx(sum(helpful) / 2)
    without = score(samples[:2], environments, RewardSection(accuracy=1.0, format=1.0), 10)
    assert without.total.tolist() == [0.0, 0.0]  # rules alone: neither is of the format
    assert "helpfulness" not in without.parts


def test_metrics_leave_out_what_does_not_exist():
    def metrics(accuracy, correct):
        nan = math.nan
        helpful = [0.25 if math.isnan(a) else nan for a in accuracy]
        parts = {"accuracy": torch.tensor(accuracy), "helpfulness": torch.tensor(helpful)}
        rewards = Rewards(parts, torch.zeros(4), torch.tensor(correct), torch.zeros(4, dtype=torch.bool))
        samples = [sample("a ✓")] * 4
        two, four = [samples[0].problem] * 2, [[1, 2]] * 4
        return describe_rollout(
            Rollout(two, four[:2], four, [[True, True]] * 4, [[0.0] * 2] * 4, ["a"] * 4, samples, 1.0), rewards
        )

    mixed = metrics([1.0, 0.0, math.nan, math.nan], [True, False, False, False])
    assert mixed.reward_parts == {"accuracy": 0.5, "helpfulness": 0.25}
    assert (mixed.pass_at_g, mixed.claimed, mixed.verdict_precision) == (1.0, 1.0, 0.5)
    alone = metrics([math.nan] * 4, [False] * 4)
    assert alone.reward_parts == {"accuracy": None, "helpfulness": 0.25}
    assert (alone.pass_at_g, alone.claimed) == (None, None)


def recipe(tmp_path, dense, tokenizer, **fields):
    save_model(dense, tmp_path / "start", tokenizer)
    raw = {
        "name": "run", "out": str(tmp_path / "runs"), "template": "plain", "steps": 4, "save_every": 1,
        "model": {"path": str(tmp_path / "start")},
        "environments": [
            {"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}},
            {"name": "talk", "path": str(tmp_path / "open.jsonl"), "open": True, "weight": 2.0},
        ],
        "reward": {"format": 0.1, "model": {"path": str(tmp_path / "judge")}},
        "grpo": {"group_size": 4, "questions_per_step": 3, "max_tokens": 8, "kl": 0.0},
        "optimizer": {"lr": 0.01},
    }  # fmt: skip
    return parse_recipe(raw | fields, RLRecipe)


def test_reinforcement_learning_with_a_reward_model_resumes_bit_for_bit(
    tmp_path, dense, tokenizer, judge, prompts, monkeypatch
):
    def closed(self, samples):  # a random model ends no thinking
        return scored(self, [Sample(s.problem, s.text + "</think>so " + s.text[7:], 5, False) for s in samples])

    scored = RewardScorer.__call__
    monkeypatch.setattr(RewardScorer, "__call__", closed)
    whole = rl(recipe(tmp_path, dense, tokenizer, name="whole", eval_every=2, eval_problems=4))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    helpful = [line["reward_helpfulness"] for line in lines if "reward_helpfulness" in line]
    assert helpful
    assert all(0 < value < 1 for value in helpful)
    assert all("eval_talk" not in line for line in lines)
    assert "eval_chain_sum" in lines[-1]
    assert "| step | chain_sum |" in (whole / "model" / "README.md").read_text()
    step = GRPOTrainer.step

    def stop(self, progress=0.0):
        if self.steps == 2:
            raise RuntimeError("stopped here")
        return step(self, progress)

    again = recipe(tmp_path, dense, tokenizer, name="cut", eval_every=2, eval_problems=4)
    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "step", stop)
        with pytest.raises(RuntimeError, match="stopped here"):
            rl(again)
    cut = rl(again, resume=True)
    name = "model/model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert (cut / name).read_bytes() != (tmp_path / "start" / "model.safetensors").read_bytes()


def test_with_rollouts_on_ray_nothing_changes(tmp_path, dense, tokenizer, judge, prompts):
    def steps(fleet):
        checked = recipe(tmp_path, dense, tokenizer, reward={"length": 0.5, "model": {"path": str(judge)}})
        environments, model = [open_environment(section) for section in checked.environments], copy.deepcopy(dense)
        if fleet:
            section = checked.rollouts.model_copy(update={"workers": 1, "staleness": 0, "threads": 1})
            checked = on_ray(checked.model_copy(update={"rollouts": section}))
        workers = RayFleet(FakeRay(), checked, model.config) if fleet else None
        trainer = GRPOTrainer(model, tokenizer, environments, checked, fleet=workers)
        return [trainer.step().rollout.reward_parts for _ in range(2)], model.state_dict()

    (here, weights), (apart, theirs) = steps(fleet=False), steps(fleet=True)
    assert here == apart
    assert any(parts["helpfulness"] is not None for parts in here)
    assert all(torch.equal(t, theirs[name]) for name, t in weights.items())


def test_only_open_problems_and_rules(tmp_path, dense, tokenizer, prompts):
    talk = {"name": "talk", "path": str(prompts), "open": True}
    made = recipe(tmp_path, dense, tokenizer, environments=[talk], reward={"length": 1.0}, steps=1)
    run_dir = rl(made)
    line = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert "reward_accuracy" not in line
    assert "pass_at_g" not in line
    assert line["reward_length"] <= 0


TALK = {"name": "talk", "path": "open.jsonl", "open": True}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"environments": [{"name": "chain_sum"}]}, r"reward.model: it scores answers to open problems, and no envir"),
        (
            {"reward": {"format": 0.0}},
            r"environment talk: open = true, but nothing rewards its answers; set reward.mod",
        ),
        ({"environments": [TALK], "eval_every": 2}, r"eval_every: all environments are open"),
        ({"environments": [{"name": "chain_sum", "open": True}]}, r"environment chain_sum: open = true is for a file"),
        ({"reward": {"model": {"pth": "m"}}}, r"field reward.model.pth is unknown|field reward.model.path is missing"),
        ({"reward": {"model": {"path": "m", "weight": 0}}}, r"reward.model.weight = 0: "),
    ],
)
def test_recipes_that_are_refused(fields, sentence, tmp_path, dense, tokenizer):
    with pytest.raises(UserError, match=sentence):
        recipe(tmp_path, dense, tokenizer, **fields)


def test_a_distillation_keeps_the_most_helpful_answers(tmp_path, dense, tokenizer, judge, prompts, monkeypatch):
    """Of an open problem's whole answers the one that the reward model likes best, however long."""
    monkeypatch.setattr(
        RewardScorer, "__call__", lambda self, samples: [float("best" in sample.text) for sample in samples]
    )
    talk = EnvironmentSection(name="talk", path=str(prompts), open=True, prompt="{question}")
    scripts = ["ok</think>so", "ok</think>the best, it seems", "never ends", "ok</think>" + "word " * 400]
    teacher = Teacher(tokenizer, scripts)
    monkeypatch.setattr(distillation, "Engine", lambda path, device: teacher)
    monkeypatch.setattr("helpers.scripted_teacher.eval", lambda text: 0, raising=False)  # it computes no sums here
    save_model(dense, tmp_path / "start", tokenizer)
    raw = {
        "name": "talker", "out": str(tmp_path), "teacher": str(tmp_path / "start"), "template": "plain",
        "model": {"path": str(tmp_path / "start"), "dtype": "float32"}, "problems": 6, "samples": 4, "max_tokens": 100,
        "environments": [talk.model_dump(exclude_none=True)], "reward": {"model": {"path": str(judge)}},
        "train": {"steps": 1},
    }  # fmt: skip
    folder = distillation.distill(parse_recipe(raw, DistillRecipe))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == ["ok</think>the best, it seems"] * 6
    assert {row["reward"] for row in rows} == {1.0}
    counts = json.loads((folder / "sampling.json").read_text())["talk"]
    assert counts == {"kept": 6, "not among the best": 6, "no answer": 6, "not ended": 6}
    assert str(judge / "model.safetensors") in json.loads((folder / "inputs.json").read_text())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"environments": [{"name": "a"}], "reward": {"model": {"path": "m"}}},
            r"reward\.model: it scores answers to ",
        ),
        ({"environments": [TALK], "reward": {"format": 0}}, "environment talk: open = true, but nothing rewards"),
        ({"environments": [TALK], "reward": {"model": {"path": "nowhere"}}}, r"nowhere/config\.json does not exist"),
        ({"environments": [TALK], "teacher": "worked-solutions"}, "environment talk: there are no worked solutions"),
    ],
)
def test_distillations_that_are_refused(fields, sentence, tmp_path, dense, tokenizer, prompts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(dense, tmp_path / "start", tokenizer)
    raw = {"name": "a", "teacher": "start", "model": {"path": "start"}, "train": {"steps": 1}}
    with pytest.raises(UserError, match=sentence):
        distillation.distill(parse_recipe(raw | fields, DistillRecipe))


def test_files_that_are_refused(tmp_path, dense, tokenizer, judge, prompts):
    recipe(tmp_path, dense, tokenizer)
    with pytest.raises(UserError, match=r"start is a language model .*; give a reward model"):
        check_reward_model(str(tmp_path / "start"))
    with pytest.raises(UserError, match=r"elsewhere/config\.json does not exist"):
        rl(recipe(tmp_path, dense, tokenizer, reward={"model": {"path": str(tmp_path / "elsewhere")}}))
    closed = EnvironmentSection(name="talk", path=str(prompts))
    with pytest.raises(UserError, match=r"field answer is missing .*; add it, or set open = true for prompts without"):
        open_environment(closed)
    prompts.write_text('{"prmpt": "a"}\n')
    with pytest.raises(UserError, match=r"field question is missing"):
        open_environment(closed.model_copy(update={"open": True}))


def test_evaluation_leaves_out_open_problems_by_name(tmp_path, prompts, capsys):
    path = tmp_path / "tasks.toml"
    head = f'name = "t"\nsteps = 1\nmodel.path = "m"\nreward.format = 1.0\n[[environments]]\nname = "talk"\nopen = true\npath = "{prompts}"\n'  # noqa: E501
    path.write_text(head + '[[environments]]\nname = "chain_sum"\n')
    (section,) = split_tasks(str(path))
    assert open_task(section).name == "chain_sum"
    assert "without talk, where nothing says which answers are right" in capsys.readouterr().err
    path.write_text(head)
    with pytest.raises(UserError, match=r"nothing says which answers to talk are right \(open = true\)"):
        split_tasks(str(path))
