import json
import re

import matplotlib.image
import numpy as np
import pytest

from rorqual.errors import UserError
from rorqual.report import write_report
from rorqual.report.charts import running_mean
from rorqual.report.formatting import count, duration, flops, opening, percent
from rorqual.report.run_record import read_run


def result(value, **more):
    return {"pass_at_1": value, "interval": [value - 0.02, value + 0.02], "problems": 1000} | more


SUMMARY = {
    "stages": [
        {"name": "tokenizer", "seconds": 4, "tokens": 1e6},
        {"name": "pretrain", "seconds": 300, "tokens": 5e6, "tasks": {"countdown": result(0.341)}},
        {
            "name": "distillation",
            "seconds": 60,
            "tokens": 1e6,
            "tasks": {
                "countdown": result(
                    0.612, cons_at_k=0.7, cons_interval=[0.67, 0.73], pass_at_k=0.85, k=8,
                    verified_share=0.8, verdict_precision=0.86,
                )
            },
        },
    ],
    "total_seconds": 581,
    "seed": 3,
    "gains": {"rl": {"countdown": {"gain": 0.271, "interval": [0.25, 0.292]}}},
    "thinking_curve": {"countdown": [{"budget": b} | result(b / 200) for b in (16, 64)]},
    "by_difficulty": {"countdown": {"numbers=3": result(0.7), "numbers=4": result(0.4)}},
    "samples": [
        {"family": "countdown", "question": "<script>alert(1)</script>", "before": "1 ✗", "after": "<think>2 ✓</think>"}
    ],
    "model": {"total": 1.07e6, "active": 6.2e5},
    "chat_command": "rorqual chat runs/x/model",
}  # fmt: skip
LEDGER = {
    "stages": {
        "pretrain": {"tokens": 4.9e6, "flops": 1.8e13, "seconds": 300, "utilisation": 0.319},
        "rl": {"tokens": 7.2e6, "flops": 1.1e13, "seconds": 198, "utilisation": 0.296},
    },
    "total": {"tokens": 12.1e6, "flops": 2.9e13, "seconds": 498, "utilisation": 0.3},
    "predicted": {"pretrain": {"seconds": 310, "tokens": 5e6}, "seconds": 600, "flops": None},
    "machine": {"processor": "Some & chip", "threads": 2, "matrix_peak_flops": 1.88e11},
}


def write_metrics(folder, lines, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def pretraining(n=40):
    return [
        {"step": s, "seconds": s, "tokens": 100 * s, "loss": 5 / s, "max_vio_per_layer": [1 / s, 2 / s]}
        | ({"valid_bpb": 3 / s} if s % 10 == 0 else {})
        for s in range(1, n + 1)
    ]


def reinforcement(n=40):
    return [
        {
            "step": s,
            "reward": s / n,
            "reward_accuracy": s / n,
            "reward_<b>": 0.5,
            "length": 50 + s,
            "eval_countdown": 0.5,
        }
        | ({"sample": "<think>5 ✓</think>"} if s == n else {})
        for s in range(1, n + 1)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "speed & run"
    write_metrics(run / "pretrain", pretraining(), tail='{"step": 41, "lo')
    write_metrics(run / "rl", [*reinforcement(), {"step": 40, "note": "step 40: the gradient <is> not finite"}])
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "ledger.json").write_text(json.dumps(LEDGER))
    (run / "recipe.toml").write_text('name = "x"  # <b>\n')
    return write_report(run)


def text_of(page):
    """The page as read: tags and style away, entities as they are."""
    html = re.sub(r"<style>.*?</style>", "", page.read_text(), flags=re.DOTALL)
    return re.sub(r"<[^>]*>", " ", html).replace("\N{NO-BREAK SPACE}", " ")


def test_two_sentences_say_what_happened(whole):
    text = opening(read_run(whole.parent)).replace("\N{NO-BREAK SPACE}", " ")
    assert "in 9 min 41 s" in text
    assert "61.2 % [59.2, 63.2] of 1000 held-out countdown problems" in text
    assert "against 34.1 % after pre-training" in text
    assert "majority vote of 8 answers solves 70.0 %" in text
    assert "marks 80.0 % of its answers as verified, of which 86.0 % are correct" in text
    assert len(re.findall(r"\.(?: |$)", text)) == 2


def test_the_page_needs_nothing_else(whole):
    html = whole.read_text()
    sources = re.findall(r"(?:src|srcset|href)=['\"]([^'\"]*)", html)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html
    assert "width=device-width" in html


def test_every_text_from_the_run_is_escaped(whole):
    html = whole.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "<title>speed &amp; run" in html
    assert "Some &amp; chip" in html
    assert "gradient &lt;is&gt; not finite" in html
    assert "# &lt;b&gt;" in html
    assert "<i class=tag>&lt;think&gt;</i>" in html


def test_every_picture_is_there_in_both_themes_with_a_caption(whole):
    html = whole.read_text()
    names = {
        "stages", "thinking", "difficulty", "pretrain-loss", "pretrain-bits-per-byte", "pretrain-maxvio",
        "rl-dev", "rl-reward", "rl-length",
    }  # fmt: skip
    drawn = {p.stem for p in (whole.parent / "figures").iterdir()}
    assert drawn == names | {f"{name}-dark" for name in names}
    assert html.count("<figure>") == len(re.findall(r"<figcaption><b>[^<]+</b> [^<]{20,}", html)) == len(names)
    light = matplotlib.image.imread(whole.parent / "figures/rl-reward.png")[..., :3]
    dark = matplotlib.image.imread(whole.parent / "figures/rl-reward-dark.png")[..., :3]
    assert light.mean() > 0.8
    assert dark.mean() < 0.3
    assert light.std() > 0.03


def test_stages_ledger_and_samples_are_told(whole):
    text = text_of(whole)
    assert re.search(r"distillation\s+61.2 % \[59.2, 63.2\]\s+70.0 % \[67.0, 73.0\]\s+85.0 %\s+80.0 %\s+86.0 %", text)
    assert re.search(r"pretrain\s+5 min 0 s\s+\(5 min 10 s\)\s+4.9 M\s+\(5 M\)\s+18 TFLOP\s+31.9 %", text)
    assert re.search(r"total\s+8 min 18 s\s+\(10 min 0 s\)", text)
    assert "measured peak 188 GFLOP/s" in text
    assert re.search(r"Before\s+1\s+✗\s+After\s+&lt;think&gt;\s*2\s+✓", text)
    assert "reinforcement learning +27.1 points [+25.0, +29.2]" in text
    assert "An answer at step 40" in text
    assert "rorqual chat runs/x/model" in text
    assert "1.07 M" in text
    assert "620 K active" in text
    assert "Seed 3" in text


@pytest.mark.parametrize(
    ("lines", "sentence", "figures"),
    [
        (pretraining(),
         "Pre-training made 40 steps on 4 K tokens in 40 s. Held-out bits per byte went from 0.3 to 0.075.",
         {"loss", "bits-per-byte", "maxvio"}),
        (reinforcement(), "Reinforcement learning made 40 steps. Accuracy in training went from",
         {"dev", "reward", "length"}),
    ],
)  # fmt: skip
def test_a_run_of_one_kind(tmp_path, lines, sentence, figures):
    write_metrics(tmp_path, lines)
    assert sentence in text_of(write_report(tmp_path))
    assert {p.stem for p in (tmp_path / "figures").iterdir() if "-dark" not in p.stem} == figures


def test_difficulty_of_the_last_stage_where_the_summary_has_no_table(tmp_path):
    levels = {"numbers=3": result(0.7), "numbers=4": result(0.4)}
    stages = [{"name": "rl", "tasks": {"countdown": result(0.5, by_difficulty=levels), "other": None}}]
    (tmp_path / "summary.json").write_text(json.dumps({"stages": stages}))
    write_report(tmp_path)
    assert (tmp_path / "figures/difficulty.png").exists()


def test_a_student_is_not_the_runs_model(tmp_path):
    tasks = {name: {"countdown": result(value)} for name, value in (("start", 0.1), ("rl", 0.5), ("student", 0.2))}
    stages = [{"name": name, "tasks": found, "student": name == "student"} for name, found in tasks.items()]
    (tmp_path / "summary.json").write_text(json.dumps({"stages": stages}))
    text = " ".join(text_of(write_report(tmp_path)).split())
    assert "the model solves 50.0 % [48.0, 52.0]" in text
    assert "50.0 % pass@1 on countdown, from 10.0 %" in text
    assert "student 20.0 % [18.0, 22.0]" in text


def test_a_reward_model_has_a_loss_of_its_own(tmp_path):
    write_metrics(tmp_path, [{"step": step, "loss": 0.7 - step / 10, "valid_loss": 0.7} for step in (1, 2, 3)])
    (tmp_path / "recipe.toml").write_text('kind = "reward"\nname = "x"\n')
    text = text_of(write_report(tmp_path))
    assert "Reward model made 3 steps" in text
    assert "It is 0.69 for a model that cannot tell them apart" in text
    assert "cross-entropy" not in text


def test_what_is_not_a_number_is_left_out(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": "much"}, {"step": 5, "loss": 1.0}]
    write_metrics(tmp_path, lines, tail='{"step": 4, "loss": NaN}\n[1, 2]\n"text"\n{"loss": 3}\n\n{"step"')
    part = read_run(tmp_path).parts[0]
    assert part.series("loss") == ([1.0, 5.0], [2.0, 1.0])
    assert write_report(tmp_path).exists()


def test_the_recipe_tells_fine_tuning_from_pretraining(tmp_path):
    write_metrics(tmp_path, pretraining())
    (tmp_path / "recipe.toml").write_text('kind = "sft"\nname = "x"\n')
    assert "<h2>Supervised fine-tuning</h2>" in write_report(tmp_path).read_text()


def test_ledgers_of_the_parts_where_the_run_has_none(tmp_path):
    for name in ("pretrain", "rl"):
        write_metrics(tmp_path / name, pretraining(3))
        (tmp_path / name / "student").mkdir()
        account = {"stages": {name: LEDGER["stages"][name]}, "predicted": {"seconds": 100, "tokens": None}}
        (tmp_path / name / ("ledger.json" if name == "rl" else "student/ledger.json")).write_text(json.dumps(account))
    text = text_of(write_report(tmp_path))
    assert re.search(r"pretrain/student: pretrain\s+5 min 0 s\s+\(1 min 40 s\)\s+4.9 M", text)
    assert re.search(r"rl\s+3 min 18 s\s+\(1 min 40 s\)\s+7.2 M", text)


def test_a_report_of_the_ledger_alone(tmp_path):
    (tmp_path / "ledger.json").write_text(json.dumps(LEDGER))
    page = write_report(tmp_path)
    assert "Cost</h2>" in page.read_text()
    assert "Results</h2>" not in page.read_text()


def test_faults_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"run folder .*nowhere does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary.json is not valid JSON .* delete it"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(UserError, match="must contain a JSON object, not a list"):
        write_report(tmp_path)


DEEP = "[" * 100_000
ODD = [
    ("metrics.jsonl", f'{DEEP}\n{{"step": 1, "loss": 1.0}}\n{{"step": {"9" * 400}, "loss": 1.0}}\n', None),
    ("metrics.jsonl", f'{{"step": 1, "loss": {"9" * 400}}}\n{{"step": 2, "loss": -1e308}}\n', None),
    ("metrics.jsonl", '{"step": 1, "loss": "nan"}\n{"step": 2, "loss": {"a": [1]}}\n', None),
    ("ledger.json", DEEP, r"ledger.json is not valid JSON .*; delete it to report without it"),
    ("ledger.json", '{"stages": {"rl": 3}}', r"ledger.json: stages\.rl = 3 is not valid; delete the file"),
    ("ledger.json", '{"stages": {"rl": null}, "total": null}', None),
    ("summary.json", '{"stages": 5}', r"summary.json: stages = 5 is not valid"),
    ("summary.json", '{"stages": [{"name": "rl", "tasks": {"sums": [1]}}]}', r"stages\.0\.tasks\.sums = "),
    ("summary.json", '{"stages": [{"tasks": {"a": {"pass_at_1": 1, "interval": 7}}}]}', r"tasks\.a\.interval = 7"),
    ("summary.json", '{"by_difficulty": {"sums": 7}}', r"by_difficulty\.sums = .* is not valid"),
    ("summary.json", '{"model": {"total": 5, "active": "x"}}', r"model\.active = .* is not valid"),
    ("summary.json", '{"stages": null, "samples": [null], "gains": {"rl": null}, "notes": null}', None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "refused"), ODD)
def test_files_that_no_run_wrote(tmp_path, name, text, refused):
    write_metrics(tmp_path, [{"step": 1, "loss": 1.0}])
    (tmp_path / name).write_text(text)
    if refused is None:
        assert write_report(tmp_path).exists()
    else:
        with pytest.raises(UserError, match=refused):
            write_report(tmp_path)


def test_a_page_that_cannot_be_written(tmp_path):
    write_metrics(tmp_path, [{"step": 1, "loss": 1.0}])
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report.html cannot be written"):
        write_report(tmp_path)


def test_numbers_as_words():
    assert [count(v) for v in (7, 950, 1234, 1.07e6, 671e9, 14.8e12)] == [
        "7",
        "950",
        "1.23 K",
        "1.07 M",
        "671 B",
        "14.8 T",
    ]
    assert [duration(v) for v in (4.2, 59, 581, 7260)] == ["4.2 s", "59 s", "9 min 41 s", "2 h 1 min"]
    assert [flops(v) for v in (3.2e13, 1.88e11, 5)] == ["32 TFLOP", "188 GFLOP", "5 FLOP"]
    assert [percent(v) for v in (0.3412, None, float("nan"))] == ["34.1\N{NO-BREAK SPACE}%", "–", "–"]


def test_smoothing_is_centred_and_keeps_constants():
    assert running_mean([3.0] * 7, 2).tolist() == [3.0] * 7
    line = np.arange(9.0)
    assert running_mean(line, 2)[2:-2].tolist() == line[2:-2].tolist()
