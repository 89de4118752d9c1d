"""--out: answers are kept, an interrupted evaluation ends as an undisturbed one, and other settings are refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from helpers.scripted_models import END, SAY, save_puppet, vocabulary
from rorqual.cli.entry import app
from rorqual.engine import Engine
from rorqual.errors import Stopped, UserError
from rorqual.evals.evaluate import evaluate
from rorqual.evals.out_folder import file_name
from rorqual.files import locked

CHOICES = {"1": 30.0, "2": 30.0, END: 29.5}
SAMPLES = 64  # 4 problems a batch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that answers with ones and twos."""
    path = tmp_path_factory.mktemp("model")
    return save_puppet(path, vocabulary(), {SAY: CHOICES, "1": CHOICES, "2": CHOICES})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "gsm.jsonl"
    rows = [{"question": f"Number {i}?", "answer": f"#### {12 if i % 2 else 1}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(model, data, out, engine=None, **options):
    from rorqual.evals.tasks import open_task

    settings = {"samples": SAMPLES, "problems": 10, "max_tokens": 6, "quiet": True} | options
    task = open_task("gsm8k", data=str(data))
    return evaluate(engine or Engine(model), [task], out=out, model={"model": "puppet"}, **settings)


def files(out):
    """What an evaluation leaves, without times."""
    found = {}
    for path in sorted(out.rglob("*.json*")):
        text = path.read_text()
        if path.name.startswith("results"):
            value = json.loads(text)
            for key in ("seconds", "date", "total_evaluation_time_seconds"):
                value.pop(key, None)
            for key in ("start_time", "end_time", "total_evaluation_time_secondes"):
                value.get("config_general", {}).pop(key, None)
            text = json.dumps(value)
        if path.name != "evaluation.json":
            found[str(path.parent.relative_to(out)), path.name.partition("_20")[0]] = text
    return found


class Interrupted(Engine):
    """Is interrupted in its third batch."""

    calls = 0

    def generate(self, *args, **options):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().generate(*args, **options)


def test_an_interrupted_evaluation_ends_as_an_undisturbed_one(model, data, tmp_path):
    whole = run(model, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path / "cut", Interrupted(model))
    answers = tmp_path / "cut" / "answers" / "gsm8k.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    answers.write_bytes(b"".join(lines) + lines[0] + lines[1][:100])  # a kill amid a write: part of a batch
    resumed = run(model, data, tmp_path / "cut", engine := Interrupted(model))
    assert engine.calls == 1  # only the third batch was sampled
    assert resumed.tasks == whole.tasks
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert 0 < whole.tasks["gsm8k"].pass_at_1 < 1
    again = run(model, data, tmp_path / "cut", engine := Interrupted(model))
    assert (engine.calls, again.tasks) == (0, whole.tasks)


class Terminated(Engine):
    """Is told to end in its second batch."""

    calls = 0

    def generate(self, *args, **options):
        self.calls += 1
        if self.calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().generate(*args, **options)


def test_a_signal_ends_it_with_a_sentence(model, data, tmp_path, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=rf"stopped by SIGTERM amid an evaluation; {tmp_path}/cut keeps the finished "):
        run(model, data, tmp_path / "cut", Terminated(model), quiet=False)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert capsys.readouterr().err == "640 answers to gsm8k\n"
    assert run(model, data, tmp_path / "cut", quiet=False).tasks == run(model, data, tmp_path / "whole").tasks
    assert re.fullmatch(r"640 answers to gsm8k\ngsm8k: pass@1 0\.\d{3}, \d+ s\n", capsys.readouterr().err)


def test_problems_have_seeds_of_their_own_whatever_the_batch(model, data, tmp_path):
    assert run(model, data, None).tasks == run(model, data, tmp_path / "out").tasks


def test_other_settings_are_refused_and_nothing_is_lost(model, data, tmp_path):
    out = tmp_path / "out"
    run(model, data, out, problems=4)
    before = files(out)
    more = data.with_name("more.jsonl")
    more.write_text(data.read_text().replace("Number", "Which number"))
    for options, message in (
        (
            {"temperature": 1.0},
            "begun with temperature = 0.6, not 1.0; give the same settings to continue",
        ),
        ({"seed": 1}, "begun with seed = 0, not 1"),
        ({"max_tokens": 7}, "begun with max_tokens = 6, not 7"),
        ({"problems": 5}, "begun with prompts of gsm8k = "),
        ({"data": more}, "begun with prompts of gsm8k = "),
    ):
        with pytest.raises(UserError, match=message):
            run(
                model,
                options.get("data", data),
                out,
                **{"problems": 4} | {k: options[k] for k in options if k != "data"},
            )
    assert files(out) == before


def test_a_folder_in_use_or_damaged_is_refused(model, data, tmp_path):
    out = tmp_path / "out"
    run(model, data, out, problems=4)
    code = f"import sys\nfrom pathlib import Path\nfrom rorqual.files import locked\n" \
        f"with locked(Path({str(out / 'lock')!r}), 'x'):\n    print('held', flush=True); sys.stdin.read()"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another evaluation writes to"):
            run(model, data, out, problems=4)
        holder.stdin.close()
    with locked(out / "lock", "x"):
        pass
    answers = out / "answers" / "gsm8k.jsonl"
    answers.write_text(answers.read_text().replace('"problem": 1', '"problem": 7'))
    with pytest.raises(UserError, match=r"gsm8k\.jsonl is damaged \(line 2 is of another problem\); remove it"):
        run(model, data, out, problems=4)
    (out / "evaluation.json").write_text("[]")
    with pytest.raises(UserError, match=r"evaluation\.json is not of rorqual eval"):
        run(model, data, out, problems=4)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be"):
        run(model, data, tmp_path / "file" / "out", problems=4)


GUESS = '''
class Guess:
    """Asks again once; right where the two turns begin with the same token."""

    problems = [{"question": "One or two?", "key": k} for k in range(60)]
    turns = 2

    def reply(self, text, state):
        state.setdefault("said", []).append(text)
        return "Again?" if len(state["said"]) == 1 else None

    def reward(self, messages):
        first, again = (m["content"] for m in messages if m["role"] == "assistant")
        return float(first[:1] == again[:1])
'''


def test_the_turns_of_episodes_are_kept_and_read(model, tmp_path):
    (tmp_path / "guess.py").write_text(GUESS)
    settings = {"samples": 16, "problems": 2, "max_tokens": 200, "quiet": True}

    def result(out):
        task = f"{tmp_path}/guess.py:Guess"
        return evaluate(Engine(model), [task], out=out, model={"model": "puppet"}, **settings).tasks[task]

    found = result(tmp_path / "out")
    (file,) = (tmp_path / "out" / "answers").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    samples = [sample for row in rows for sample in row["samples"]]
    assert len(samples) == 32
    for sample in samples:
        first, asked, again = sample["messages"]
        assert sample["turns"] == 2
        assert asked == {"role": "user", "content": "Again?"}
        assert (first["role"], again) == ("assistant", {"role": "assistant", "content": sample["text"]})
        assert sample["correct"] == (first["content"][:1] == again["content"][:1])
        assert set(first["content"]) <= {"1", "2"}
    assert 0 < found.pass_at_1 < 1
    assert result(tmp_path / "out") == found  # read
    for sample in samples:  # as folders from before have them
        del sample["messages"], sample["turns"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert result(tmp_path / "out") == found


def test_other_answers_have_no_turns(model, data, tmp_path):
    run(model, data, tmp_path, problems=1)
    row = json.loads((tmp_path / "answers" / "gsm8k.jsonl").read_text())
    assert not {"turns", "messages"} & row["samples"][0].keys()


def test_names_of_files():
    assert file_name("aime24") == "aime24"
    assert len({file_name(name) for name in ("a/b.jsonl", "a_b.jsonl", "a:b.jsonl")}) == 3


@pytest.mark.slow  # starts a process
def test_a_killed_command_goes_on(model, data, tmp_path):
    words = ["eval", str(model), "--tasks", "gsm8k", "--data", str(data), "--samples", str(SAMPLES), "--problems", "16",
             "--max-tokens", "20", "--json", "--out"]  # fmt: skip
    program = "import sys; from rorqual.cli.entry import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words, str(tmp_path / "cut")], stdout=subprocess.DEVNULL
    )
    answers = tmp_path / "cut" / "answers" / "gsm8k.jsonl"
    while not answers.exists() or not answers.stat().st_size:
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 4 <= answers.read_bytes().count(b"\n") < 16
    resumed, whole = (CliRunner().invoke(app, [*words, str(tmp_path / name)]) for name in ("cut", "whole"))
    assert (resumed.exit_code, whole.exit_code) == (0, 0), resumed.output
    assert json.loads(resumed.stdout)["tasks"] == json.loads(whole.stdout)["tasks"]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
