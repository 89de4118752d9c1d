import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.data.tokenizer import load_tokenizer
from rorqual.engine import Completion, Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.recipe import DistillRecipe, EnvironmentSection, RewardSection, parse_recipe
from rorqual.rl import rejection_sampling
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.rejection_sampling import distill, rejection_sample

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
SECTION = EnvironmentSection(name="chain_sum", config=SUMS, prompt="{expression}")


class Teacher:
    prefix_cache = False

    """Answers every sum by the scripts in turn; a script may use the right answer."""

    def __init__(self, tokenizer, scripts):
        self.tokenizer, self.scripts, self.asked = tokenizer, scripts, []
        self.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512))

    def require_tokenizer(self):
        return self.tokenizer

    def opening(self, prompt):
        return "<think>"

    def generate(self, prompts, params):
        found = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            self.asked.append(text)
            right = eval(text.partition("\n")[0])
            for i in range(params.n):
                answer = self.scripts[i % len(self.scripts)].replace("RIGHT", str(right))
                tokens = self.tokenizer(answer).input_ids
                cut = len(tokens) > params.max_tokens
                found.append(Completion(answer, tokens, [0.0] * len(tokens), "length" if cut else "stop"))
        return found


GOOD = "so</think><answer>RIGHT</answer>"
LONG = "well, let me see</think><answer>RIGHT</answer>"
BARE = "so</think>it is <answer>RIGHT</answer>"
WRONG = "so</think><answer>no</answer>"


def sample(tokenizer, scripts, problems=20, keep=1, max_tokens=200, sections=(SECTION,)):
    teacher = Teacher(tokenizer, scripts)
    environments = [open_environment(section) for section in sections]
    params = SamplingParams(n=len(scripts), max_tokens=max_tokens)
    batches = rejection_sample(teacher, environments, problems, "plain", RewardSection(), params, keep, seed=1)
    return [row for _, rows in batches for row in rows], teacher


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


def distill_recipe(tmp_path, **changes):
    raw = {
        "name": "taught",
        "out": str(tmp_path),
        "teacher": "unused",
        "model": {"path": str(tmp_path / "student")},
        "environments": [SECTION.model_dump()],
        "template": "plain",
        "problems": 24,
        "samples": 2,
        "optimizer": {"lr": 0.01},
        "train": {"epochs": 25, "batch_size": 4},
        "sequence_length": 64,
    }
    return parse_recipe(raw | changes, DistillRecipe)


def test_distill_teaches_a_student(tokenizer, dense, tmp_path, monkeypatch):
    save_model(dense, tmp_path / "student", tokenizer)
    monkeypatch.setattr(rejection_sampling, "Engine", lambda path, device: Teacher(tokenizer, [GOOD, LONG]))
    run_dir = distill(distill_recipe(tmp_path))
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    student = run_dir / "student" / "model"
    engine = Engine(load_model(student), load_tokenizer(student))
    params = SamplingParams(temperature=0.0, max_tokens=30)
    prompts = [row["prompt"] for row in rows[:4]]
    assert all(c.text.startswith("so</think><answer>") for c in engine.generate(prompts, params))
    assert distill(distill_recipe(tmp_path), resume=True) == run_dir
    assert not (run_dir / "samples.partial.jsonl").exists()


def test_a_killed_distillation_keeps_its_samples(tokenizer, dense, tmp_path, monkeypatch):
    save_model(dense, tmp_path / "student", tokenizer)

    class Killed(BaseException):
        pass

    teachers, batches = [], 0

    class Mortal(Teacher):
        def generate(self, prompts, params):
            nonlocal batches
            batches += 1
            if batches == 3:
                raise Killed
            return super().generate(prompts, params)

    def engine(path, device):
        teachers.append(Mortal(tokenizer, [GOOD, LONG]))
        return teachers[-1]

    monkeypatch.setattr(rejection_sampling, "Engine", engine)
    monkeypatch.setattr(rejection_sampling, "BATCH", 8)
    monkeypatch.setattr(rejection_sampling, "sft", lambda recipe, resume: None)
    with pytest.raises(Killed):
        distill(distill_recipe(tmp_path))
    partial = tmp_path / "taught" / "samples.partial.jsonl"
    assert json.loads(partial.read_text().splitlines()[-1])["done"] == 16
    with partial.open("a") as file:
        file.write('{"done": 24, "ro')  # the kill came in the midst of a line
    killed = distill(distill_recipe(tmp_path), resume=True) / "samples.jsonl"
    assert len(teachers[1].asked) == 8  # what was done is not sampled again
    assert not partial.exists()
    whole = distill(distill_recipe(tmp_path, name="whole")) / "samples.jsonl"
    assert killed.read_text() == whole.read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_told_once():
    """Closing the file tries again to write what was left, and must not say so in place of the first failure."""
    with rejection_sampling.open_to_append(Path("/dev/full")) as file:
        file.write("{}\n")
        with pytest.raises(OSError, match="No space left"):
            file.flush()


def test_a_student_that_cannot_start_costs_no_samples(tokenizer, dense, tmp_path, monkeypatch):
    """What the student alone reads may change until it has begun; then its own run holds to it."""
    save_model(dense, tmp_path / "student", tokenizer)
    teacher = Teacher(tokenizer, [GOOD, LONG])
    monkeypatch.setattr(rejection_sampling, "Engine", lambda path, device: teacher)
    few = {"problems": 4, "train": {"steps": 1, "batch_size": 2}}
    with pytest.raises(UserError, match="no sample with an assistant turn within"):
        distill(distill_recipe(tmp_path, **few, sequence_length=2))
    asked = len(teacher.asked)
    with pytest.raises(UserError, match="samples was 2 and is 3 now"):
        distill(distill_recipe(tmp_path, **few, samples=3), resume=True)
    again = distill_recipe(tmp_path, **few, optimizer={"lr": 1e-3})
    assert (distill(again, resume=True) / "student" / "model" / "config.json").exists()
    assert len(teacher.asked) == asked
    with pytest.raises(UserError, match=r"student/recipe\.toml: optimizer\.lr was 0\.001 and is 0\.01 now"):
        distill(distill_recipe(tmp_path, **few), resume=True)


def test_nothing_right_leaves_the_name_free(tokenizer, dense, tmp_path, monkeypatch):
    save_model(dense, tmp_path / "student", tokenizer)
    monkeypatch.setattr(rejection_sampling, "sft", lambda recipe, resume: None)
    monkeypatch.setattr(rejection_sampling, "Engine", lambda path, device: Teacher(tokenizer, [WRONG, WRONG]))
    with pytest.raises(UserError, match="none of 2 completions of each of 24 problems is correct"):
        distill(distill_recipe(tmp_path))
    monkeypatch.setattr(rejection_sampling, "Engine", lambda path, device: Teacher(tokenizer, [GOOD, WRONG]))
    assert (distill(distill_recipe(tmp_path, teacher="stronger")) / "samples.jsonl").exists()


def test_distill_checks_the_student_and_the_questions_first(tokenizer, dense, tmp_path, monkeypatch):
    save_model(dense, tmp_path / "student", tokenizer)
    teacher = Teacher(tokenizer, [GOOD])
    monkeypatch.setattr(rejection_sampling, "Engine", lambda path, device: teacher)
    rows = [{"question": f"{i}+1", "answer": str(i + 1)} for i in range(40)] + [{"question": "1+" * 300, "answer": "1"}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "name": "taught", "out": str(tmp_path), "teacher": "unused", "model": {"path": str(tmp_path / "student")},
        "environments": [{"name": "mine", "path": str(tmp_path / "mine.jsonl")}], "template": "plain",
        "max_tokens": 64, "problems": 8, "samples": 2, "train": {"epochs": 1},
    }  # fmt: skip
    cases = (
        ({"sequence_length": 513}, r"sequence_length = 513: the model's context holds 512"),
        ({"model": {"config": {}}}, r"model.path is missing"),
        ({}, r"mine\.jsonl, line 41: the prompt has \d+ tokens and leaves no space for max_tokens = 64"),
        ({"max_tokens": 512}, r"max_tokens = 512 leaves no space for a prompt"),
    )
    for number, (change, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            distill(parse_recipe(raw | change | {"name": f"taught-{number}"}, DistillRecipe))
        assert teacher.asked == []
