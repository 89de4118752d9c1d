"""Results in lm-eval's format, read by lm-eval's own functions, and in lighteval's as its tracker writes them."""

import json

import pytest

from rorqual.engine import Completion
from rorqual.evals.evaluate import evaluate
from rorqual.evals.tasks import open_task


class Three:
    """An engine whose samples are: right, wrong, right but unfinished."""

    tokenizer, max_num_seqs = None, 8

    def require_tokenizer(self):
        return None

    def encode(self, text, begin=True):
        return text

    def opening(self, prompt):
        return ""

    def check(self, prompts, params):
        pass

    def generate(self, prompts, params, progress=None):
        progress(len(prompts) * params.n)
        ends = [("\\boxed{7}", "stop"), ("\\boxed{8}", "stop"), ("\\boxed{7}", "length")]
        return [Completion(text, [0] * 5, [], reason) for _ in prompts for text, reason in ends]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_text(
        "".join(json.dumps({"problem": f"{i}?", "answer": 7 + i % 2, "level": i % 2}) + "\n" for i in range(4))
    )
    task = open_task("math500", data=str(path))
    monkeypatch.setattr(task, "prompt", lambda problem, tokenizer, template: problem.question)
    evaluate(Three(), [task], samples=3, out=tmp_path / "out", model={"model": "org/tiny"}, seed=3, quiet=True)
    return tmp_path / "out"


def test_lm_eval_reads_it(folder):
    from lm_eval import utils

    names = [str(path) for path in (folder / "lm-eval" / utils.sanitize_model_name("org/tiny")).iterdir()]
    (results,), (samples,) = utils.get_results_filenames(names), utils.get_sample_results_filenames(names)
    assert utils.get_file_datetime(results.removesuffix(".json")) == utils.get_file_datetime(samples)
    assert utils.get_file_task_name(samples.rpartition("/")[2]) == "math500"
    with open(results) as file:
        found = json.load(file)
    table = [[cell.strip() for cell in line.split("|")] for line in utils.make_table(found).splitlines()]
    rows = {row[5]: row[6:10] for row in table}
    assert rows["pass@1"] == ["↑", "0.3333", "±", "0.0000"]
    assert rows["truncated"][:2] == ["↓", "0.3333"]
    assert any(row[1:3] == ["math500", "1"] for row in table)
    assert found["results"]["math500"]["cons@3,none"] == 0.5  # ties between 7 and 8
    assert found["results"]["math500"]["pass@1_stderr,none"] == 0.0
    assert found["configs"]["math500"]["generation_kwargs"] == {
        "temperature": 0.6, "top_p": 0.95, "max_gen_toks": 1024, "do_sample": True, "seed": 3, "n": 3,
        "thinking_budget": None, "until": [],
    }  # fmt: skip
    assert found["n-samples"] == {"math500": {"original": 4, "effective": 4}}
    with open(samples) as file:
        rows = [json.loads(line) for line in file]
    assert [row["doc_id"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["resps"] == [["\\boxed{7}", "\\boxed{8}", "\\boxed{7}"]]
    assert rows[0]["filtered_resps"] == ["7", "8", ""]
    assert [row["pass@1"] for row in rows] == [pytest.approx(1 / 3)] * 4
    assert rows[0]["arguments"]["gen_args_0"]["arg_0"].startswith("0?\nPlease reason")


def test_the_fields_are_those_of_lm_evals_schema(folder):
    from lm_eval.result_schema import EvalResults, SampleResult

    (results,) = (folder / "lm-eval").rglob("results_*.json")
    assert set(json.loads(results.read_text())) <= set(EvalResults.__annotations__)
    (samples,) = (folder / "lm-eval").rglob("samples_*.jsonl")
    row = json.loads(samples.read_text().splitlines()[0])
    assert set(SampleResult.__annotations__) <= set(row)


def test_lighteval(folder):
    (path,) = (folder / "lighteval" / "results" / "org__tiny").iterdir()
    found = json.loads(path.read_text())
    # EvaluationTracker.generate_final_dict and GeneralConfigLogger of lighteval 0.13
    assert list(found) == [
        "config_general", "results", "versions", "config_tasks", "summary_tasks", "summary_general",
    ]  # fmt: skip
    assert set(found["config_general"]) == {
        "lighteval_sha", "num_fewshot_seeds", "max_samples", "job_id", "start_time", "end_time",
        "total_evaluation_time_secondes", "model_config", "model_name",
    }  # fmt: skip
    assert set(found["results"]) == {"math500:0", "all"}
    assert found["results"]["math500:0"]["pass@1"] == pytest.approx(1 / 3)
    assert found["results"]["math500:0"]["pass@1_stderr"] == found["results"]["all"]["pass@1_stderr"] == 0.0
    assert found["versions"] == {"math500:0": 1}
    assert found["summary_tasks"]["math500:0"]["truncated"] == found["summary_general"]["truncated"] == 4


def test_our_own_holds_every_setting(folder):
    found = json.loads((folder / "results.json").read_text())
    settings = ("model", "samples", "temperature", "top_p", "max_tokens", "seed", "template", "thinking_budget")
    assert [found[name] for name in settings] == ["org/tiny", 3, 0.6, 0.95, 1024, 3, "chat", None]
    task = found["tasks"]["math500"]
    assert (task["judge"], task["truncated_share"], task["answered_share"]) == (
        "final answer, by value", pytest.approx(1 / 3), pytest.approx(2 / 3),
    )  # fmt: skip
    assert set(task["by_difficulty"]) == {"0", "1"}
