"""rorqual eval with benchmarks from local files: tables, JSON, the audit, and bad input as one sentence."""

import json

import pytest
from typer.testing import CliRunner

from helpers.scripted_models import END, SAY, save_puppet, vocabulary
from rorqual.cli.entry import app
from rorqual.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that answers 7 to everything."""
    return save_puppet(tmp_path_factory.mktemp("model"), vocabulary(), {SAY: "7", "7": END})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    problems = [{"problem": f"Number {i}?", "answer": str(7 + i % 2), "level": 1} for i in range(4)]
    (folder / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    prompt = {"key": 0, "prompt": "No comma!", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    (folder / "ifeval.jsonl").write_text(json.dumps(prompt) + "\n")
    return folder


def run(model, *words):
    done = CliRunner().invoke(app, ["eval", str(model), "--samples", "2", "--max-tokens", "8", *map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_two_benchmarks_as_json(model, data):
    found = json.loads(run(
        model, "--tasks", "math500,ifeval", "--data", f"math500={data / 'math.jsonl'}",
        "--data", f"IFEval={data / 'ifeval.jsonl'}", "--audit", "--json",
    ))  # fmt: skip
    assert (found["samples"], found["temperature"], found["top_p"], found["max_tokens"]) == (2, 0.6, 0.95, 8)
    assert {name: row["pass_at_1"] for name, row in found["tasks"].items()} == {"math500": 0.5, "ifeval": 1.0}
    assert found["tasks"]["math500"]["cons_at_k"] == 0.5
    assert found["tasks"]["ifeval"]["metrics"]["inst_level_loose_acc"]["value"] == 1.0
    assert {name: row["judge"] for name, row in found["tasks"].items()} == {
        "math500": "final answer, by value", "ifeval": "all instructions, strictly",
    }  # fmt: skip
    assert {name: (audit["answers"], audit["share"]) for name, audit in found["audits"].items()} == {
        "math500": (8, 0.0), "ifeval": (2, 0.0),
    }  # fmt: skip


def test_a_table_and_the_audit(model, data, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    said = run(model, "--tasks", "math500", "--data", data / "math.jsonl", "--audit")
    for part in ("50.0", "at most 8 tokens", "judged by final answer, by value", "math-verify", "0.0 %"):
        assert part in " ".join(said.split()), part


def test_questions_that_the_context_does_not_hold_count_as_unfinished(model, tmp_path):
    rows = [{"problem": "x" * (9 if i % 2 else 900), "answer": "7"} for i in range(4)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--tasks", "aime24", "--data", tmp_path / "m.jsonl", "--out", tmp_path / "out")
    found = json.loads(run(model, *words, "--json"))["tasks"]["aime24"]
    assert (found["problems"], found["unasked"], found["scores"]) == (4, 2, [0.0, 1.0, 0.0, 1.0])
    assert (found["pass_at_1"], found["truncated_share"]) == (0.5, 0.5)
    assert "2 questions of aime24 exceed the context" in " ".join(run(model, *words).split())
    (tmp_path / "m.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match=r"m\.jsonl, line 1: .*context"):
        run(model, "--tasks", "aime24", "--data", tmp_path / "m.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "math500", "--data", "none.jsonl"], "none.jsonl does not exist; check the path"),
        (["--tasks", "math500", "--data", "gsm8k=x.jsonl"], "gsm8k is no benchmark of --tasks, .* with math500"),
        (["--tasks", "math500", "--data", "math500="], "math500 is no benchmark of --tasks, or has no path"),
        (["--tasks", "math500,gsm8k", "--data", "x.jsonl"], "names no benchmark of --tasks; write TASK=PATH"),
        (["--tasks", "countdown", "--data", "x.jsonl"], "names no benchmark of --tasks; write TASK=PATH"),
        (["--tasks", "gsm8k", "--data", "gsm8k=a.jsonl", "--data", "gsm8k=b.jsonl"], "gives data of gsm8k twice"),
        (["--tasks", "aime26"], "or do you mean the benchmark aime2[45]?"),
        (["--tasks", "aime24:year=2"], "aime24 has no options; write aime24"),
        (["--tasks", "livecodebench:begin=2"], "livecodebench has only start, end; write livecodebench"),
    ],
)
def test_bad_input_is_one_sentence(words, message, model):
    with pytest.raises(UserError, match=message) as caught:
        run(model, *words)
    assert "\n" not in str(caught.value)
