"""The audit of the judges, and the published metrics of benchmarks in results and tables."""

import io
import json

import pytest
from rich.console import Console

from rorqual.evals.audit import audit
from rorqual.evals.collected import Collected, Sample
from rorqual.evals.result_tables import audit_tables, table
from rorqual.evals.results import Evaluation
from rorqual.evals.summary import summarise
from rorqual.evals.tasks import open_task


def collected(task, texts, reasons=None):
    """All texts as samples of each problem."""
    problems = task.problems(9, 0)
    samples = []
    for problem in problems:
        for text, end in zip(texts, reasons or ["stop"] * len(texts), strict=True):
            answer = task.answer(problem, "", text) if end == "stop" else None
            (correct,) = task.score([problem], [text], [answer])
            parts = task.parts(problem, text) if hasattr(task, "parts") else {}
            samples.append(Sample(text, "", 9, end, answer, correct, parts))
    return Collected(problems, ["?"] * len(problems), samples)


def shown(*tables):
    out = io.StringIO()
    Console(file=out, width=160).print(*tables)
    return out.getvalue()


def test_disagreements_are_counted_and_drawn(tmp_path):
    (tmp_path / "m.jsonl").write_text(
        json.dumps({"question": "?", "choices": ["a", "b", "c", "d"], "answer": 1}) + "\n"
    )
    task = open_task("mmlu", data=str(tmp_path / "m.jsonl"))
    texts = ["Answer: B", "\\boxed{B}", "\\boxed{A}", "Answer: B. \\boxed{A}", "\\boxed{B}"]
    found = audit(task, collected(task, texts, ["stop"] * 4 + ["length"]), 0)
    assert (found.answers, found.only_first, found.only_second, found.share) == (4, 1, 1, 0.5)
    assert [(one.reply, one.correct) for one in found.drawn] == [("\\boxed{B}", False), (texts[3], True)]
    assert (found.judge, found.second_judge) == (task.judge, task.second_judge)
    assert len(audit(task, collected(task, texts), 0, drawn=1).drawn) == 1
    text = shown(*audit_tables({"mmlu": found}))
    assert "50.0 %" in text
    assert "\\boxed{B}" in text


def test_math_verify_is_the_second_judge_of_mathematics(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"problem": "Half of one?", "answer": "\\\\frac{1}{2}"}\n')
    rows = tmp_path / "own.jsonl"
    rows.write_text('{"question": "Half of one?", "answer": "1/2"}\n')
    texts = ["\\boxed{0.5}", "\\boxed{\\frac{2}{4}}", "\\boxed{2}", "<think>\\boxed{0.5}"]
    for task in (open_task("math500", data=str(tmp_path / "m.jsonl")), open_task(str(rows))):
        found = audit(task, collected(task, texts), 0)
        assert (found.answers, found.share, found.second_judge) == (4, 0.0, "math-verify")
        assert task.second_score(task.problems(1, 0) * 4, texts, [None] * 4) == [True, True, False, False]


def test_a_task_without_a_second_judge_is_not_audited():
    task = open_task("countdown:min_numbers=3,max_numbers=3")
    assert audit(task, Collected([], [], []), 0) is None


def test_metrics_of_ifeval_and_two_attempts_of_arc(tmp_path):
    row = {"key": 1, "prompt": "?", "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
           "kwargs": [{}, {}]}  # fmt: skip
    (tmp_path / "i.jsonl").write_text(json.dumps(row) + "\n")
    task = open_task("ifeval", data=str(tmp_path / "i.jsonl"))
    result = summarise(collected(task, ["<<a>>", "a"]), judge=task.judge)
    assert result.pass_at_1 == 0.5
    assert {name: metric.value for name, metric in result.metrics.items()} == {
        "inst_level_strict_acc": 0.75, "prompt_level_loose_acc": 0.5, "inst_level_loose_acc": 0.75,
    }  # fmt: skip
    assert result.cons_at_k is None
    grids = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]], "output": [[4]]}]}
    (tmp_path / "a.json").write_text(json.dumps(grids))
    arc = open_task("arc-agi", data=str(tmp_path / "a.json"))
    found = summarise(collected(arc, ["[4]", "[5]", "[5]"]), judge=arc.judge, attempts=arc.attempts)
    assert found.metrics["pass@2"].value == pytest.approx(2 / 3)  # of 3 pairs, 2 have the right one
    assert found.pass_at_1 == pytest.approx(1 / 3)
    assert summarise(collected(arc, ["[4]"]), attempts=arc.attempts).metrics == {}
    tasks = {"ifeval": result, "arc-agi": found}
    text = shown(table(Evaluation(tasks, 3, 3, 5, "test", "chat", 0.6, 0.95, 32768, None, 1.0)))
    for part in ("inst_level_strict_acc", "pass@2", "66.7", "at most 32768 tokens", "top-p 0.95", "seed 5",
                 "ifeval: all instructions, strictly", "arc-agi: every cell"):  # fmt: skip
        assert part in " ".join(text.split()), part
