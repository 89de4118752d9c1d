from helpers.scripted_teacher import BARE, GOOD, LONG, SECTION, WRONG, Teacher
from rorqual.engine import SamplingParams
from rorqual.recipe import RewardSection
from rorqual.rl import rejection_sampling
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.rejection_sampling import rejection_sample


def sample(tokenizer, scripts, problems=20, keep=1, max_tokens=200, sections=(SECTION,)):
    teacher = Teacher(tokenizer, scripts)
    environments = [open_environment(section) for section in sections]
    params = SamplingParams(n=len(scripts), max_tokens=max_tokens)
    batches = rejection_sample(teacher, environments, problems, "plain", RewardSection(), params, keep, seed=1)
    return [row for batch in batches for row in batch.rows], teacher


def test_keeps_the_best_and_among_equals_the_shortest(tokenizer):
    rows, teacher = sample(tokenizer, [WRONG, LONG, BARE, GOOD, GOOD])
    assert len(rows) == 20
    assert all(row["completion"].startswith("so</think><answer>") for row in rows)
    assert all(row["prompt"].endswith("\n<think>") for row in rows)
    assert {row["reward"] for row in rows} == {2.0}  # accuracy and format
    assert sorted({row["prompt"] for row in rows}) == sorted(teacher.asked)


def test_keeps_different_ones_only(tokenizer):
    rows, _ = sample(tokenizer, [GOOD, GOOD, LONG, WRONG, BARE], problems=5, keep=3)
    starts = [row["completion"].partition("</think>")[0] for row in rows]
    assert starts == ["so", "well, let me see", "so"] * 5


def test_truncated_and_wrong_answers_are_never_kept(tokenizer):
    rows, _ = sample(tokenizer, [GOOD + "x" * 100, LONG, WRONG], max_tokens=60)
    assert {row["completion"].partition("</think>")[0] for row in rows} == {"well, let me see"}


def test_training_problems_only_and_by_weight(tokenizer):
    other = SECTION.model_copy(
        update={"name": "basic_arithmetic", "config": {}, "prompt": "{expression}", "weight": 3.0}
    )
    teacher = Teacher(tokenizer, [GOOD])
    environments = [open_environment(section) for section in (SECTION, other)]
    drawn = rejection_sampling.draw_problems(environments, 40, seed=0)
    assert [sum(p.family == f for p in drawn) for f in ("chain_sum", "basic_arithmetic")] == [10, 30]
    assert {p.split for p in drawn} == {"train"}
    assert len({p.question for p in drawn}) == 40
    assert teacher.asked == []
