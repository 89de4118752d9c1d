import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from rorqual.data.tokenizer import train_tokenizer
from rorqual.engine import Completion, Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.evals.evaluate import collect, evaluate, thinking_curve
from rorqual.evals.result_tables import table
from rorqual.evals.results import Gain, compare
from rorqual.evals.summary import read_verdicts
from rorqual.evals.tasks import open_task
from rorqual.model import Transformer
from rorqual.model.config import ModelConfig
from rorqual.recipe import RewardSection, TokenizerSection
from rorqual.rl.envs.registry import Problem
from rorqual.rl.rewards import Sample, score


class Sums:
    """A task of ten sums in two difficulties; the prompt is the right answer, for the scripted engine to use."""

    name, split, judge = "sums", "all", "equal text"

    def problems(self, n, seed):
        made = [Problem(f"{i}+{i}", str(2 * i), str(i), f"digits={1 + i // 5}", "sums") for i in range(10)]
        return made[:n]

    def prompt(self, problem, tokenizer, template):
        return problem.question + "=" + problem.answer

    def answer(self, problem, prompt, text):
        return text.rpartition("</think>")[2].strip() or None

    def score(self, problems, texts, answers):
        return [p.answer == a for p, a in zip(problems, answers, strict=True)]


class Texts:
    """Of an engine that takes a prompt's text for its tokens."""

    def __init__(self, tokenizer=None):
        self.tokenizer = tokenizer

    def require_tokenizer(self):
        return self.tokenizer

    def encode(self, text, begin=True):
        return text

    def opening(self, prompt):
        return "<think>" if prompt.endswith("<think>") else ""


class ScriptedEngine(Texts):
    """Right `right` times of n (the first ones), the rest wrong in different ways; asked params are kept."""

    def __init__(self, right, tokenizer=None):
        super().__init__(tokenizer)
        self.right, self.asked = right, []

    def check(self, prompts, params):
        pass

    def generate(self, prompts, params, progress=None):
        self.asked.append(params)
        made = []
        for prompt in prompts:
            for j in range(params.n):
                gold = prompt.partition("=")[2]
                right = j < self.right(params)
                mark = "✓" if right or j == params.n - 1 else "✗"
                text = f"{gold} ✗\n{gold} {mark}\n</think> {gold if right else -j}"
                made.append(Completion(text, [0] * (10 + j), [], "stop"))
        progress(len(made))
        return made


def run(engine, **options):
    return evaluate(engine, [Sums()], **({"samples": 4, "problems": 10, "quiet": True} | options))


def test_the_numbers_and_their_names():
    row = run(ScriptedEngine(lambda p: 2)).tasks["sums"]
    assert row.pass_at_1 == 0.5
    assert row.interval == (0.5, 0.5)
    assert row.cons_at_k == 1.0  # two right ones agree, the wrong ones do not
    assert row.pass_at_k == 1.0
    assert (row.k, row.problems) == (4, 10)
    assert row.mean_tokens == 11.5
    assert row.truncated_share == 0.0
    assert row.verified_share == 0.75  # two right ones and the last
    assert row.verdict_precision == pytest.approx(2 / 3)
    assert row.scores == [0.5] * 10
    assert {level: part.problems for level, part in row.by_difficulty.items()} == {"digits=1": 5, "digits=2": 5}


def test_pass_at_k_for_fewer_than_all_samples():
    row = run(ScriptedEngine(lambda p: 1), k=2).tasks["sums"]
    assert row.pass_at_k == pytest.approx(0.5)
    assert row.k == 2


def test_verdict_precision_by_a_checker_of_lines():
    checked = []

    def check(problem, text):
        checked.append((problem.answer, text))
        return text == problem.answer

    row = run(ScriptedEngine(lambda p: 2), check_line=check).tasks["sums"]
    assert row.verdict_precision == 1.0
    assert ("18", "18") in checked


def test_r1_sampling_is_the_default_and_passed_on():
    engine = ScriptedEngine(lambda p: 1)
    run(engine, seed=7)
    params = engine.asked[0]
    assert (params.temperature, params.top_p, params.n, params.seed) == (0.6, 0.95, 4, 7)
    run(engine, temperature=1.0, top_p=1.0, max_tokens=5)
    assert (engine.asked[1].temperature, engine.asked[1].top_p, engine.asked[1].max_tokens) == (1.0, 1.0, 5)


def test_truncated_completions_have_no_answer():
    class Cut(ScriptedEngine):
        def generate(self, *args, **kwargs):
            done = super().generate(*args, **kwargs)
            return [Completion(c.text, c.tokens, c.logprobs, "length") for c in done]

    row = run(Cut(lambda p: 4)).tasks["sums"]
    assert (row.truncated_share, row.pass_at_1, row.cons_at_k) == (1.0, 0.0, None)


def test_answers_that_a_prompt_began_are_read_as_rewards_read_them(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "6*4?", "answer": 24}\n')

    class Said(Texts):
        def check(self, prompts, params):
            assert prompts == ["6*4?\n<think>"]

        def generate(self, prompts, params, progress=None):
            texts = [
                "</think><answer>24</answer>",
                "24",
                "</think>It is 24.",
                "24</think>",
                "</think><answer>24</answer>",
            ]
            reasons = ["stop", "stop", "stop", "stop", "length"]
            return [Completion(t, [0], [], reason) for t, reason in zip(texts, reasons, strict=True)]

    class Tokenizer:
        chat_template = None

        def __call__(self, text, add_special_tokens=True):
            return SimpleNamespace(input_ids=[])

        def decode(self, ids):
            return ""

    (task,) = [open_task(str(path))]
    params = SamplingParams(n=5)
    found = collect(Said(Tokenizer()), task, task.problems(9, 0), params, "plain")
    assert [s.correct for s in found.samples] == [True, False, True, False, False]
    samples = [
        Sample(task.problems(9, 0)[0], "<think>" + s.text, 1, s.finish_reason == "length") for s in found.samples
    ]
    rewards = score(samples, {"mine": task.environment}, RewardSection(), 9)
    assert rewards.correct.tolist() == [s.correct for s in found.samples]


def test_two_models_are_compared_whatever_their_templates(tmp_path):
    class Other(Sums):
        def prompt(self, problem, tokenizer, template):
            return "<user>" + super().prompt(problem, tokenizer, template)

    options = {"samples": 4, "problems": 10, "quiet": True}
    before, after = (evaluate(ScriptedEngine(lambda p: 2), [task], **options) for task in (Sums(), Other()))
    assert compare(before.tasks, after.tasks)["sums"].gain == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples = 0"),
        ({"problems": -1}, "problems = -1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": -1}, "temperature = -1"),
        ({"top_p": 0}, "top_p = 0"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"thinking_budget": -1}, "thinking_budget = -1"),
        ({"template": "chatml"}, "template = 'chatml'"),
        ({"k": 5}, "k = 5"),
    ],
)
def test_settings_are_checked_before_anything_is_sampled(options, message):
    engine = ScriptedEngine(lambda p: 1)
    with pytest.raises(UserError, match=message):
        run(engine, **options)
    assert not engine.asked


def test_all_tasks_are_checked_before_the_first_is_asked():
    class Refusing(ScriptedEngine):
        def check(self, prompts, params):
            if any("long" in prompt for prompt in prompts):
                raise UserError("prompt 1 has 9 tokens, but the model's context holds 8")

    class Long(Sums):
        name = "long"

        def prompt(self, problem, tokenizer, template):
            return "long" + problem.answer

    engine = Refusing(lambda p: 1)
    with pytest.raises(UserError, match="task long: prompt 1 has 9 tokens"):
        evaluate(engine, [Sums(), Long()], samples=2, problems=3, quiet=True)

    class OfAFile(Long):
        def problems(self, n, seed):
            return [replace(problem, where="mine.jsonl, line 7") for problem in super().problems(n, seed)]

    with pytest.raises(UserError, match=r"^mine\.jsonl, line 7: prompt 1 has 9 tokens"):
        evaluate(engine, [Sums(), OfAFile()], samples=2, problems=3, quiet=True)
    assert not engine.asked


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63])
def test_any_seed_is_one(seed):
    assert run(ScriptedEngine(lambda p: 2), seed=seed).tasks["sums"].interval == (0.5, 0.5)


def test_the_result_is_json_and_a_table():
    result = run(ScriptedEngine(lambda p: 2))
    written = json.loads(json.dumps(result.to_dict()))
    assert written["tasks"]["sums"]["interval"] == [0.5, 0.5]
    assert set(written["tasks"]["sums"]["by_difficulty"]) == {"digits=1", "digits=2"}
    out = io.StringIO()
    Console(file=out, width=140).print(table(result))
    assert "50.0 [50.0, 50.0]" in out.getvalue()
    assert "digits=2" in out.getvalue()


def test_stages_are_compared_by_problem():
    before, after = run(ScriptedEngine(lambda p: 1)), run(ScriptedEngine(lambda p: 3))
    assert compare(before.tasks, after.tasks)["sums"] == Gain(0.5, (0.5, 0.5))
    other = run(ScriptedEngine(lambda p: 3), problems=5)
    with pytest.raises(UserError, match="different problems"):
        compare(before.tasks, other.tasks)


def test_the_curve_forces_the_budget_and_keeps_the_problems():
    engine = ScriptedEngine(lambda p: min(4, p.thinking_budget // 16))
    curve = thinking_curve(engine, Sums(), [64, 16], samples=4, problems=10, quiet=True)
    assert [(point.budget, point.pass_at_1) for point in curve] == [(16, 0.25), (64, 1.0)]
    assert [params.thinking_budget for params in engine.asked] == [16, 64]
    assert set(vars(curve[0])) == {"budget", "pass_at_1", "interval", "mean_tokens"}


def test_reading_verdicts():
    text = "3 + 4 = 7 ✗\n3 * 4 = 12 ✓\n</think> 3 * 4 ✗"
    assert read_verdicts(text) == [("3 + 4 = 7", False), ("3 * 4 = 12", True)]
    assert read_verdicts("no verdict") == []


@pytest.mark.parametrize("options", [{"samples": 0}, {"problems": 0}, {"k": 5}])
def test_impossible_requests(options):
    with pytest.raises(UserError, match="must be"):
        run(ScriptedEngine(lambda p: 1), **options)


class NoPrefix:
    """As much of a tokenizer as a plain prompt needs: one that puts nothing before a text."""

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[])

    def decode(self, ids):
        return ""


def test_a_real_environment_end_to_end():
    class Oracle(ScriptedEngine):
        def generate(self, prompts, params, progress=None):
            return [Completion("<think>hm</think><answer>0</answer>", [1, 2], [], "stop")] * (len(prompts) * params.n)

    result = evaluate(Oracle(None, NoPrefix()), ["chain_sum"], samples=2, problems=5, template="plain", quiet=True)
    row = result.tasks["chain_sum"]
    assert row.problems == 5
    assert row.pass_at_1 <= 0.2
    assert row.answered_share == 1.0


def test_with_the_engine_itself():
    """A network of random weights: nothing is right, but budgets hold and the same seed gives the same answers."""
    tokenizer = train_tokenizer(
        ["1 + 2 = 3\n"], TokenizerSection(vocab_size=300, special_tokens=["<think>", "</think>"])
    )
    config = ModelConfig(
        model_type="llama", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    engine = Engine(Transformer(config), tokenizer)
    options = {"samples": 2, "problems": 3, "template": "plain", "max_tokens": 24, "quiet": True}
    task = "countdown:min_numbers=3,max_numbers=3"
    first = evaluate(engine, [task], **options)
    again = evaluate(engine, [task], **options)
    assert first.tasks == again.tasks
    row = first.tasks[task]
    assert row.pass_at_1 == 0.0
    assert row.mean_tokens <= 24
    assert row.truncated_share > 0
    curve = thinking_curve(engine, task, [0, 8], **options)
    assert [point.budget for point in curve] == [0, 8]
