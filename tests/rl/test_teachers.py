"""On-policy distillation."""

import copy

import pytest
import torch

from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.data.tokenizer import train_tokenizer
from rorqual.errors import UserError
from rorqual.model import Transformer
from rorqual.recipe import OPDSection, RLRecipe, TokenizerSection, load_recipe, parse_recipe
from rorqual.rl.envs.environment import Environment, Problem
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.rl_run import rl
from rorqual.rl.rollout_logprobs import rollout_logprobs
from rorqual.rl.teachers import check_teachers


class Sums(Environment):
    def candidate(self, seed, index):
        a, b = index * 7 % 50, (index + seed) % 40
        return Problem(f"{a}+{b}=", str(a + b), f"{a} {b}", "", self.family)

    def check(self, problem, answer):
        return float(answer == problem.answer)


@pytest.fixture
def dense(dense, tokenizer, tmp_path):
    """As it is read from its files, in `tmp_path`/self."""
    save_model(dense, tmp_path / "self", tokenizer)
    return load_model(tmp_path / "self")


@pytest.fixture
def teacher(dense, tokenizer, tmp_path):
    """Another model than `dense`, and its path."""
    torch.manual_seed(7)
    model = Transformer(dense.config)
    save_model(model, tmp_path / "teacher", tokenizer)
    return model, str(tmp_path / "teacher")


def trainer(model, tokenizer, opd, reward=None, lr=0.01, **grpo):
    sizes = {"algorithm": "opd", "group_size": 4, "questions_per_step": 4, "max_tokens": 12, "micro_tokens": 128}
    recipe = parse_recipe(
        {
            "name": "toy",
            "model": {"path": "unused"},
            "environments": [{"name": "sums"}, {"name": "more"}],
            "template": "plain",
            "steps": 100,
            "seed": 3,
            "reward": reward or {},
            "opd": opd,
            "optimizer": {"lr": lr, "weight_decay": 0.0},
            "grpo": sizes | grpo,
        },
        RLRecipe,
    )
    return GRPOTrainer(model, tokenizer, [Sums("sums", 1.0), Sums("more", 1.0)], recipe)


@torch.no_grad()
def divergence(student, teacher):
    """KL(π‖π_T) over the whole vocabulary, on texts that neither has seen."""
    tokens = torch.randint(5, 200, (8, 12), generator=torch.Generator().manual_seed(11))
    p, q = (model.eval().logits(tokens).float().log_softmax(-1) for model in (student, teacher))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("loss", ["sampled", "full"])
def test_the_student_moves_to_the_teacher(loss, dense, teacher, tokenizer):
    model, path = teacher
    toy = trainer(dense, tokenizer, {"teacher": path, "loss": loss}, group_size=8)
    before = divergence(dense, model)
    updates = [toy.step().update for _ in range(15)]
    first, last = (sum(u.opd_kl for u in part) / 3 for part in (updates[:3], updates[-3:]))
    assert last < 0.7 * first
    assert divergence(dense, model) < before
    assert toy.update.teachers.models[path].head_weight.grad is None


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.8, "temperature": 0.7}])
def test_the_estimate_is_that_of_the_sampled_tokens(fields, dense, teacher, tokenizer):
    model, path = teacher
    toy = trainer(dense, tokenizer, {"teacher": path}, **fields)
    rollout = toy.rollouts.next(0).rollout
    own, theirs = (rollout_logprobs(m.eval(), rollout, range(16), toy.section) for m in (dense, model))
    expected = sum(sum(a) - sum(b) for a, b in zip(own, theirs, strict=True)) / rollout.tokens
    toy = trainer(dense, tokenizer, {"teacher": path}, **fields)
    assert toy.step().update.opd_kl == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("loss", ["sampled", "full"])
def test_nothing_is_learnt_from_oneself(loss, dense, tokenizer, tmp_path):
    toy = trainer(dense, tokenizer, {"teacher": str(tmp_path / "self"), "loss": loss})
    update = toy.step().update
    assert update.opd_kl == pytest.approx(0.0, abs=1e-5)
    assert update.grad_norm < 1e-3


@pytest.mark.parametrize("loss", ["sampled", "full"])
def test_every_environment_has_its_teacher(loss, dense, teacher, tokenizer, tmp_path):
    """One is the student itself, so only the other environment's tokens are apart from their teacher."""
    opd = {"teacher": str(tmp_path / "self"), "teachers": {"more": teacher[1]}, "loss": loss}
    found = []
    for micro_tokens in (64, 8192):
        toy = trainer(copy.deepcopy(dense), tokenizer, opd, micro_tokens=micro_tokens, questions_per_step=6)
        rollout = toy.rollouts.next(0).rollout
        families = [s.problem.family for s in rollout.samples]
        toy = trainer(copy.deepcopy(dense), tokenizer, opd, micro_tokens=micro_tokens, questions_per_step=6)
        update = toy.step().update
        found.append((update.opd_kl, update.grad_norm))
        share = sum(n for n, name in zip(rollout.lengths.tolist(), families, strict=True) if name == "more")
    only = trainer(copy.deepcopy(dense), tokenizer, {"teacher": teacher[1], "loss": "full"}, questions_per_step=6)
    assert 0 < share < rollout.tokens
    assert 0 < found[0][0] < only.step().update.opd_kl * 1.2
    assert found[0] == pytest.approx(found[1], rel=2e-3)


def test_distillation_beside_a_reward(dense, teacher, tokenizer):
    """With a tiny weight the update is that of the reward alone, with a huge one that of the teacher alone."""
    reward = {"accuracy": 0.0, "format": 0.0, "length": 1.0}

    def norm(opd, reward=reward):
        fields = {"algorithm": "grpo" if reward else "opd", "average": "token", "kl": 0.0}
        return trainer(copy.deepcopy(dense), tokenizer, opd, reward, **fields).step().update.grad_norm

    alone = norm({"teacher": teacher[1]}, None)
    assert norm({"teacher": teacher[1], "weight": 1e-6}) == pytest.approx(norm(None), rel=1e-3)
    assert norm({"teacher": teacher[1], "weight": 1e4}) == pytest.approx(1e4 * alone, rel=1e-3)


def test_teachers_that_do_not_fit_are_refused(dense, moe, teacher, tokenizer, tmp_path):
    other = train_tokenizer(["x * y = z"], TokenizerSection(vocab_size=290, special_tokens=["<a>"]))
    save_model(dense, tmp_path / "foreign", other)
    with pytest.raises(UserError, match=r"foreign: its vocabulary is not the student's"):
        check_teachers(OPDSection(teacher=str(tmp_path / "foreign")), ["sums"], tokenizer, dense.config)
    check_teachers(OPDSection(teacher=teacher[1]), ["sums"], tokenizer, dense.config)
    larger = dense.config.replace(vocab_size=dense.config.vocab_size + 8)
    with pytest.raises(UserError, match=r"its head has 273 tokens and the student's 281"):
        check_teachers(OPDSection(teacher=teacher[1]), ["sums"], tokenizer, larger)
    smaller = dense.config.replace(vocab_size=dense.config.vocab_size - 8)
    check_teachers(OPDSection(teacher=teacher[1]), ["sums"], tokenizer, smaller)
    with pytest.raises(UserError, match=r"its head has 273 tokens and the student's 265"):
        check_teachers(OPDSection(teacher=teacher[1], loss="full"), ["sums"], tokenizer, smaller)
    with pytest.raises(UserError, match=r"opd teacher model.gguf: its weights are quantised"):
        check_teachers(OPDSection(teacher="model.gguf"), ["sums"], tokenizer, dense.config)
    with pytest.raises(UserError, match=r"nowhere"):
        check_teachers(OPDSection(teacher=str(tmp_path / "nowhere")), ["sums"], tokenizer, dense.config)


@pytest.mark.parametrize(
    ("opd", "grpo", "message"),
    [
        ({}, {}, "opd.teachers: environment sums has none; name one, or set opd.teacher"),
        ({"teachers": {"sums": "t"}}, {}, "opd.teachers: environment more has none"),
        ({"teacher": "t", "teachers": {"mroe": "t"}}, {}, "opd.teachers.mroe: there is no such environment"),
        ({"teacher": "t"}, {"max_draws": 2}, "grpo.max_draws = 2: without a reward no group's rewards differ"),
        ({"teacher": "t"}, {"drop_zero_std_groups": True}, "grpo.drop_zero_std_groups = true: without a reward"),
    ],
)
def test_contradictions_are_refused(opd, grpo, message, dense, tokenizer):
    with pytest.raises(UserError) as error:
        trainer(dense, tokenizer, opd, **grpo)
    assert message in str(error.value)


RECIPE = """
name = "run"
out = "{out}"
seed = 5
template = "plain"
steps = 2
[model]
path = "{out}/self"
[[environments]]
name = "chain_sum"
prompt = "{{expression}}"
config = {{min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 2}}
[grpo]
algorithm = "opd"
group_size = 2
questions_per_step = 2
max_tokens = 6
[opd]
teacher = "{out}/teacher"
"""


def test_a_run_and_what_it_keeps(dense, teacher, tokenizer, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE.format(out=tmp_path))
    run_dir = rl(load_recipe(tmp_path / "recipe.toml", RLRecipe))
    assert '"opd_kl": ' in (run_dir / "metrics.jsonl").read_text()
    saved = (run_dir / "recipe.toml").read_text()
    assert 'algorithm = "opd"' in saved
    assert "accuracy = 0.0" in saved
    rl(load_recipe(tmp_path / "recipe.toml", RLRecipe), resume=True)
    teacher[0].head_weight.data[0, 0] += 1
    save_model(teacher[0], tmp_path / "teacher", tokenizer)
    with pytest.raises(UserError, match=r"teacher/model.safetensors has changed since"):
        rl(load_recipe(tmp_path / "recipe.toml", RLRecipe), resume=True)
