import json
import re
from pathlib import Path

import pytest

from helpers.scripted_teacher import GOOD, LONG, SECTION, WRONG, Teacher
from helpers.training import stopped_after
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.data.chat_dataset import encode_sample
from rorqual.data.tokenizer import load_tokenizer
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.recipe import DistillRecipe, EnvironmentSection, parse_recipe
from rorqual.rl import distillation, rejection_sampling
from rorqual.rl.distillation import distill
from rorqual.rl.worked_samples import worked_tokens


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
    monkeypatch.setattr(distillation, "Engine", lambda path, device: Teacher(tokenizer, [GOOD, LONG]))
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

    monkeypatch.setattr(distillation, "Engine", engine)
    monkeypatch.setattr(rejection_sampling, "BATCH", 8)
    monkeypatch.setattr(distillation, "sft", lambda *_, **__: None)
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
    with distillation.open_to_append(Path("/dev/full")) as file:
        file.write("{}\n")
        with pytest.raises(OSError, match="No space left"):
            file.flush()


def test_a_student_that_cannot_start_costs_no_samples(tokenizer, dense, tmp_path, monkeypatch):
    """What the student alone reads may change until it has begun; then its own run holds to it."""
    save_model(dense, tmp_path / "student", tokenizer)
    teacher = Teacher(tokenizer, [GOOD, LONG])
    monkeypatch.setattr(distillation, "Engine", lambda path, device: teacher)
    few = {"problems": 4, "train": {"steps": 1, "batch_size": 2}}
    with pytest.raises(UserError, match="no sample with an assistant turn within sequence_length = 2 ") as error:
        distill(distill_recipe(tmp_path, **few, sequence_length=2))
    tokens = [
        len(encode_sample(json.loads(line), tokenizer)[0])
        for line in (tmp_path / "taught" / "samples.jsonl").read_text().splitlines()
    ]
    assert f" (they have {min(tokens)} to {max(tokens)} tokens); " in str(error.value)
    assert str(error.value).endswith("the samples are kept, so go on with --resume and the changed settings")
    with pytest.raises(
        UserError, match=r"samples of a distillation whose student.*--resume.*sequence_length=N.*remove"
    ):
        distill(distill_recipe(tmp_path, **few, samples=3))
    asked = len(teacher.asked)
    with pytest.raises(UserError, match="samples was 2 and is 3 now"):
        distill(distill_recipe(tmp_path, **few, samples=3), resume=True)
    again = distill_recipe(tmp_path, **few, optimizer={"lr": 1e-3})
    assert (distill(again, resume=True) / "student" / "model" / "config.json").exists()
    assert len(teacher.asked) == asked
    with pytest.raises(UserError, match=r"already holds a run; continue it with --resume or choose another name"):
        distill(again)
    with pytest.raises(UserError, match=r"student/recipe\.toml: optimizer\.lr was 0\.001 and is 0\.01 now"):
        distill(distill_recipe(tmp_path, **few), resume=True)


def test_a_student_whose_samples_are_all_cut_is_warned(tokenizer, dense, tmp_path, monkeypatch, capsys):
    save_model(dense, tmp_path / "student", tokenizer)
    monkeypatch.setattr(distillation, "Engine", lambda path, device: Teacher(tokenizer, [GOOD, LONG]))
    few = {"problems": 4, "train": {"steps": 1, "batch_size": 2}}
    run_dir = distill(distill_recipe(tmp_path, **few, sequence_length=11))
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    sizes = [len(encode_sample(row, tokenizer)[0]) for row in rows]
    assert (
        f"4 of 4 samples were cut at sequence_length = 11, 4 of them within their last answer, and 0 were dropped (no "
        f"assistant token within it); they have {min(sizes)} to {max(sizes)} tokens; no sample shows how an answer ends"
        in capsys.readouterr().err
    )


def test_nothing_right_leaves_the_name_free(tokenizer, dense, tmp_path, monkeypatch):
    save_model(dense, tmp_path / "student", tokenizer)
    monkeypatch.setattr(distillation, "sft", lambda *_, **__: None)
    monkeypatch.setattr(distillation, "Engine", lambda path, device: Teacher(tokenizer, [WRONG, WRONG]))
    with pytest.raises(UserError, match="none of 2 completions of each of 24 problems is correct"):
        distill(distill_recipe(tmp_path))
    monkeypatch.setattr(distillation, "Engine", lambda path, device: Teacher(tokenizer, [GOOD, WRONG]))
    assert (distill(distill_recipe(tmp_path, teacher="stronger")) / "samples.jsonl").exists()


def test_distill_checks_the_student_and_the_questions_first(tokenizer, dense, tmp_path, monkeypatch):
    save_model(dense, tmp_path / "student", tokenizer)
    teacher = Teacher(tokenizer, [GOOD])
    monkeypatch.setattr(distillation, "Engine", lambda path, device: teacher)
    rows = [{"question": f"{i}+1", "answer": str(i + 1)} for i in range(40)] + [{"question": "1+" * 300, "answer": "1"}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "name": "taught", "out": str(tmp_path), "teacher": "unused", "model": {"path": str(tmp_path / "student")},
        "environments": [{"name": "mine", "path": str(tmp_path / "mine.jsonl")}], "template": "plain",
        "max_tokens": 64, "problems": 8, "samples": 2, "train": {"epochs": 1},
    }  # fmt: skip
    cases = (
        ({"sequence_length": 513}, r"sequence_length = 513: the model's context holds 512"),
        ({"model": {"config": {"n_layers": 2}}}, r"unused.*does not exist"),
        ({}, r"mine\.jsonl, line 41: the prompt has \d+ tokens and leaves no space for max_tokens = 64"),
        ({"max_tokens": 512}, r"max_tokens = 512 leaves no space for a prompt"),
    )
    for number, (change, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            distill(parse_recipe(raw | change | {"name": f"taught-{number}"}, DistillRecipe))
        assert teacher.asked == []


RANDOM = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "tie_word_embeddings": True,
}  # fmt: skip
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


def test_a_student_from_random_weights_takes_the_teachers_tokenizer(tokenizer, dense, tmp_path, monkeypatch):
    """Its release ends and chats as the teacher does; a student stopped in training ends the same bit for bit."""
    save_model(dense, tmp_path / "teacher", tokenizer)
    (tmp_path / "teacher" / "chat_template.jinja").write_text(CHAT)
    teacher = Teacher(tokenizer, [GOOD, LONG])
    monkeypatch.setattr(distillation, "Engine", lambda path, device: teacher)
    scratch = {
        "model": {"config": RANDOM}, "teacher": str(tmp_path / "teacher"), "problems": 8,
        "train": {"steps": 20, "batch_size": 4, "save_every": 5},
    }  # fmt: skip
    run_dir = distill(distill_recipe(tmp_path, **scratch))
    engine = Engine(run_dir)
    assert engine.model.config.model_type == "deepseek_v3"
    assert engine.model.config.vocab_size == len(tokenizer)
    assert engine.end_tokens == (tokenizer.eos_token_id,)
    said = engine.tokenizer.apply_chat_template([{"role": "user", "content": "1+2"}], tokenize=False)
    assert said == "<user>1+2"
    losses = [json.loads(line)["loss"] for line in (run_dir / "student/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]

    with stopped_after(8):
        distill(distill_recipe(tmp_path, **scratch, name="again"))
    again = distill(distill_recipe(tmp_path, **scratch, name="again"), resume=True)
    whole, resumed = ((folder / "student/model/model.safetensors").read_bytes() for folder in (run_dir, again))
    assert whole == resumed


def test_worked_solutions_give_no_tokenizer(tokenizer, dense, tmp_path, monkeypatch):
    save_model(dense, tmp_path / "start", tokenizer)
    monkeypatch.setattr(distillation, "sft", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"tokenizer\.path is missing: with model\.config there is no model to take"):
        worked_recipe(tmp_path, model={"config": RANDOM})
    recipe = worked_recipe(tmp_path, model={"config": RANDOM}, tokenizer={"path": str(tmp_path / "start")}, problems=4)
    assert len((distill(recipe) / "samples.jsonl").read_text().splitlines()) > 0
    wrong = {"config": RANDOM | {"vocab_size": 9}}
    with pytest.raises(UserError, match=r"model\.config\.vocab_size = 9: the tokenizer has"):
        distill(worked_recipe(tmp_path, model=wrong, tokenizer={"path": str(tmp_path / "start")}, name="small"))
    assert not (tmp_path / "small").exists()


def worked_recipe(tmp_path, **changes):
    sections = [SECTION, EnvironmentSection(name="leg_counting", config={"min_animals": 2, "max_animals": 3})]
    raw = {"teacher": "worked-solutions", "environments": [s.model_dump() for s in sections], "keep_per_problem": 2}
    return distill_recipe(tmp_path, **raw | changes)


def test_a_cold_start_from_worked_solutions(tokenizer, dense, tmp_path, monkeypatch):
    """Each is correct, in the prompt's template, and the counts say what became of all of them."""
    save_model(dense, tmp_path / "student", tokenizer)
    students = []
    monkeypatch.setattr(distillation, "sft", lambda recipe, **_: students.append(recipe))
    more = tmp_path / "general.jsonl"
    more.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "hello"}) + "\n" for i in range(9)))
    run_dir = distill(worked_recipe(tmp_path, mix=[{"path": str(more), "samples": 4}], filter={"max_tokens": 10_000}))
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    sums = [row for row in rows if row.get("family") == "chain_sum"]
    assert len(sums) == len([row for row in rows if row.get("family") == "leg_counting"]) == 24
    for row in sums:
        assert row["completion"].endswith(f"</think><answer>{eval(row['prompt'].partition(chr(10))[0])}</answer>")
    assert len({row["completion"] for row in sums}) > 18  # two of a problem differ, nearly always
    assert sum(row["completion"] == "hello" for row in rows) == 4
    counts = json.loads((run_dir / "sampling.json").read_text())
    assert counts == {"chain_sum": {"kept": 24}, "leg_counting": {"kept": 24}, "mixed in": 4}
    assert students[0].data.path == str(run_dir / "samples.jsonl")


def test_what_the_filter_leaves_out_is_counted(tokenizer, dense, tmp_path, monkeypatch):
    save_model(dense, tmp_path / "student", tokenizer)
    monkeypatch.setattr(distillation, "sft", lambda *_, **__: None)
    again = "one more time\n" * 5 + "so</think><answer>RIGHT</answer>"
    chinese = "我们来算一下</think><answer>RIGHT</answer>"
    teacher = Teacher(tokenizer, [GOOD, GOOD, LONG, WRONG, again, chinese])
    monkeypatch.setattr(distillation, "Engine", lambda path, device: teacher)
    wanted = {"readable": True, "language": 0.9}
    run_dir = distill(distill_recipe(tmp_path, samples=6, problems=5, filter=wanted))
    counts = json.loads((run_dir / "sampling.json").read_text())
    found = {"kept": 5, "not among the best": 10, "wrong": 5, "unreadable": 5, "mixed languages": 5}
    assert counts == {"chain_sum": found, "mixed in": 0}


def test_a_family_without_worked_solutions_is_refused(tokenizer, dense, tmp_path):
    save_model(dense, tmp_path / "student", tokenizer)
    section = EnvironmentSection(name="gcd").model_dump()
    with pytest.raises(UserError, match=r"environment gcd: there are no worked solutions of it, only of chain_sum, "):
        distill(worked_recipe(tmp_path, environments=[section]))
    mix = [{"path": str(tmp_path / "none.jsonl")}]
    with pytest.raises(UserError, match=r"none\.jsonl"):
        distill(worked_recipe(tmp_path, mix=mix))


CALCULATOR = Path(__file__).parents[2] / "recipes/r1-smollm2/calculator.py"
WITH_TOOLS = (
    "{% for tool in tools or [] %}[tool {{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<end>{% endfor %}"
)


def test_worked_solutions_of_a_python_environment_call_its_tools(tokenizer, dense, tmp_path, monkeypatch):
    save_model(dense, tmp_path / "student", tokenizer)
    monkeypatch.setattr(distillation, "sft", lambda *_, **__: None)
    section = {"name": "calculator", "python": f"{CALCULATOR}:Calculator"}
    with pytest.raises(UserError, match=r"environment calculator with template = 'plain': students learn"):
        distill(worked_recipe(tmp_path, environments=[section]))
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    monkeypatch.setattr(distillation, "tokenizer_at", lambda path: tokenizer)
    run_dir = distill(worked_recipe(tmp_path, environments=[section], template="chat", problems=3, keep_per_problem=1))
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        asked, called, told, said = row["messages"]
        a, b = re.findall(r"\d+", asked["content"])
        assert called["tool_calls"][0]["function"]["arguments"] == json.dumps({"expression": f"{a} * {b}"})
        assert told["role"] == "tool"
        assert told["content"] == str(int(a) * int(b))
        assert said["content"].endswith(f"<answer>{int(a) * int(b)}</answer>")
        assert row["tools"][0]["function"]["name"] == "calculate"
        tokens, mask = encode_sample(row, tokenizer)
        trained = tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if m])
        assert "calculate" in trained
        assert "Use the tool" not in trained
        assert trained.count(told["content"]) == 2  # in thinking and answer, not as the tool's result
        # What the model would have sampled: both turns, the call and the end tokens.
        assert row["length"] == sum(mask)
        assert trained.count("<assistant>") == trained.count("<end>") == 2
        assert row["length"] > len(tokenizer(called["content"] + said["content"] + called_arguments(called)).input_ids)


def called_arguments(message):
    return message["tool_calls"][0]["function"]["arguments"]


def test_the_plan_counts_tools_and_results_of_worked_solutions(tokenizer, dense, tmp_path, monkeypatch):
    save_model(dense, tmp_path / "student", tokenizer)
    monkeypatch.setattr(distillation, "sft", lambda *_, **__: None)
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    monkeypatch.setattr(distillation, "tokenizer_at", lambda path: tokenizer)
    section = {"name": "calculator", "python": f"{CALCULATOR}:Calculator"}
    eight = {"environments": [section], "template": "chat", "problems": 8, "keep_per_problem": 1}
    recipe = worked_recipe(tmp_path, **eight)
    rows = [json.loads(line) for line in (distill(recipe) / "samples.jsonl").read_text().splitlines()]
    real = [len(encode_sample(row, tokenizer)[0]) for row in rows]
    assert worked_tokens(recipe, tokenizer) == sum(real) / 8
    # The filter's limit is of the same tokens as `length`.
    lengths = sorted(row["length"] for row in rows)
    shorter = worked_recipe(tmp_path, **eight, name="shorter", filter={"max_tokens": lengths[3]})
    kept = [json.loads(line)["length"] for line in (distill(shorter) / "samples.jsonl").read_text().splitlines()]
    assert sorted(kept) == [length for length in lengths if length <= lengths[3]]


def test_worked_solutions_of_single_turns_are_in_the_recipes_template(tokenizer, dense, tmp_path, monkeypatch):
    save_model(dense, tmp_path / "student", tokenizer)
    monkeypatch.setattr(distillation, "sft", lambda *_, **__: None)
    (tmp_path / "twice.py").write_text(
        "class Twice:\n"
        "    problems = [{'question': f'Twice {n}?', 'answer': 2 * n} for n in range(40)]\n"
        "    def worked(self, problem):\n"
        "        return f\"<think>so</think><answer>{problem['answer']}</answer>\"\n"
    )
    section = {"name": "twice", "python": f"{tmp_path}/twice.py:Twice"}
    run_dir = distill(worked_recipe(tmp_path, environments=[section], problems=2, keep_per_problem=1))
    for line in (run_dir / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["prompt"].endswith("?\n<think>")
        assert row["completion"].startswith("so</think><answer>")
        assert row["length"] == len(tokenizer(row["completion"]).input_ids) + 1  # the end token
