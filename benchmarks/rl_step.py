"""A GRPO step on SmolLM2-135M-Instruct against TRL's GRPOTrainer: same prompts, reward, optimizer and sampling.

A step is 8 questions with 8 completions each of up to 64 tokens, sampled, scored and learned from once, without a
reference model. Each side first takes a step in each of its precisions (BF16 where the processor has units for it) and
goes on with its fastest; the two then take turns. Since sampled lengths differ, seconds per completion token are given
too.
"""

import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from common import arguments, dtypes, program, ratio_of_rounds, report
from rorqual.checkpoint.gguf_import import import_model
from rorqual.checkpoint.huggingface import load_model
from rorqual.data.tokenizer import load_tokenizer
from rorqual.recipe import RLRecipe, parse_recipe
from rorqual.rl.envs.environment import Environment, Problem
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.prompts import prompt_text
from rorqual.rl.rewards import format_reward
from workers import Field, answer, timed

LR, BETAS = 1e-6, (0.9, 0.999)
MOST_STEPS = 1000
QUIET = {"TOKENIZERS_PARALLELISM": "false"}
EXAMPLES = """
What is 20 + 14?
<think>20 + 14 = 34</think><answer>34</answer>

What is 31 + 8?
<think>31 + 8 = 39</think><answer>39</answer>

What is {a} + {b}?"""


@dataclass(frozen=True)
class Task:
    """template: of Rorqual's prompts. reward: of (completion, whether it was cut off, answer)."""

    question: str
    template: str
    reward: Callable[[str, bool, str], float]


def explained(text: str, _truncated: bool, answer: str) -> float:
    """1 when the last number is the answer, and the share of digits, so that no group is without signal."""
    numbers = re.findall(r"\d+", text)
    return float(bool(numbers) and numbers[-1] == answer) + sum(map(str.isdigit, text)) / max(len(text), 1)


def tagged(text: str, truncated: bool, answer: str) -> float:
    """1 for the right answer in its tags, at the end of a completion that was not cut off, and 0.1 for the format."""
    text = f"<think>{text}"
    found = re.search(r"<answer>\s*(-?\d+)\s*</answer>\s*$", text)
    right = found is not None and found[1] == answer and not truncated
    return float(right) + 0.1 * format_reward(text)


TASKS = {
    "explain": Task("What is {a} + {b}? Explain every step, then give the answer.", "chat", explained),
    "sums": Task(EXAMPLES, "plain", tagged),
}


def problem(task: Task, index: int) -> Problem:
    a, b = (Random(index).randint(11, 99) for _ in range(2))
    return Problem(task.question.format(a=a, b=b), str(a + b), str(index), "", "sums")


class Sums(Environment):
    def __init__(self, task: Task) -> None:
        super().__init__("sums", 1.0)
        self.task = task

    def candidate(self, seed: int, index: int) -> Problem:
        return problem(self.task, index)

    def check(self, problem: Problem, answer: str) -> float:
        return float(answer == problem.answer)


@dataclass
class Step:
    """What one step took, and its completions' mean reward."""

    seconds: float
    rollout: float
    tokens: int
    reward: float


class Ours:
    def __init__(
        self, path: Path, dtype: str, questions: int, group: int, length: int, task: str = "explain", lr: float = LR
    ) -> None:
        torch.manual_seed(0)
        self.trainer = trainer_of(path, dtype, questions, group, length, TASKS[task], lr)
        self.rollouts = timed(self.trainer.engine, "generate")

    def step(self) -> Step:
        tokens, start = self.trainer.tokens, time.perf_counter()
        metrics = self.trainer.step()
        seconds = time.perf_counter() - start
        return Step(seconds, self.rollouts.pop(), self.trainer.tokens - tokens, metrics.rollout.reward)


def trainer_of(path: Path, dtype: str, questions: int, group: int, length: int, task: Task, lr: float) -> GRPOTrainer:
    raw = {
        "name": "benchmark",
        "model": {"path": str(path), "dtype": dtype},
        "environments": [{"name": "sums"}],
        "template": task.template,
        "reward": {"accuracy": 0.0, "format": 0.0, "verdict": 1.0},
        "grpo": {"group_size": group, "questions_per_step": questions, "kl": 0.0, "max_tokens": length},
        "optimizer": {"lr": lr, "betas": BETAS, "weight_decay": 0.0},
        "steps": MOST_STEPS,
    }
    return GRPOTrainer(
        load_model(path, dtype=torch.float32),
        load_tokenizer(path),
        [Sums(task)],
        parse_recipe(raw, RLRecipe),
        verdict=lambda sample, _: task.reward(sample.text, sample.truncated, sample.problem.answer),
    )


class TRL:
    """TRL's trainer, whose loop waits after each step. `dtype` autocast: FP32 weights under BF16."""

    def __init__(self, *settings: Any) -> None:
        self.settings = settings

    def step(self) -> None:
        """The first time only; its loop answers that and what is asked after it."""
        torch.manual_seed(0)
        trl_loop(*self.settings)


def trl_loop(
    path: Path, dtype: str, questions: int, group: int, length: int, name: str = "explain", lr: float = LR
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    task = TASKS[name]
    size = questions * group
    tokenizer, ours = AutoTokenizer.from_pretrained(path), load_tokenizer(path)
    problems = (p for p in (problem(task, i) for i in range(2 * questions * MOST_STEPS)) if p.split == "train")
    rows: list[dict[str, Any]] = []
    for p in problems:
        text: Any = [{"role": "user", "content": p.question}]
        if task.template == "plain":
            text = prompt_text(p.question, "plain", ours)
        rows.append({"prompt": text, "answer": p.answer})
    tokens: list[int] = []
    rewards: list[float] = []

    def score(completions: list, completion_ids: list, answer: list[str], **_: Any) -> list[float | None]:
        tokens.append(sum(map(len, completion_ids)))
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        cut = [ids[-1] != tokenizer.eos_token_id for ids in completion_ids]
        found = [task.reward(*each) for each in zip(texts, cut, answer, strict=True)]
        rewards.append(sum(found) / len(found))
        return [*found]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            answer(Step(time.perf_counter() - self.start, rollouts.pop(), tokens.pop(), rewards.pop()))

    config = GRPOConfig(
        output_dir=str(path.parent / "trl"),
        max_steps=MOST_STEPS,
        per_device_train_batch_size=min(size, 16),
        gradient_accumulation_steps=max(size // 16, 1),
        num_generations=group,
        max_completion_length=length,
        beta=0.0,
        loss_type="grpo",
        temperature=1.0,
        learning_rate=lr,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=0.0,
        bf16=dtype == "autocast",
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=stored),
        reward_funcs=score,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    rollouts = timed(trainer, "_generate")
    trainer.train()


def main() -> None:
    args = arguments(__doc__, turn=900, whole=3600)
    sizes = (2, 2, 4) if args.quick else (8, 8, 64)
    rounds = 1 if args.quick else 4
    kinds = {"rorqual": dtypes(), "trl": dtypes() + (["autocast"] if "bfloat16" in dtypes() else [])}
    makes = {"rorqual": "rl_step:Ours", "trl": "rl_step:TRL"}
    first: dict[str, dict[str, float]] = {side: {} for side in kinds}
    best: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, Field(args.turn_limit, args.limit) as field:
        path = Path(folder) / "smollm2"
        import_model("smollm2", path)
        for side, each in kinds.items():
            for dtype in each:
                name = f"{side} {dtype}"
                field.enter(name, makes[side], path, dtype, *sizes, ours=side == "rorqual", environment=QUIET)
                step = field.ask(name, "step")  # warms up
                if len(each) > 1:
                    step = field.ask(name, "step")
                if step is None:
                    continue
                first[side][dtype] = step.seconds
                if dtype == min(first[side], key=first[side].__getitem__):
                    field.leave(best.get(side, ""))
                    best[side] = name
                else:
                    field.leave(name)
        found = field.turns(best.values(), "step", (), rounds)
    steps = {side: found[name] for side, name in best.items() if name in found}
    chosen = {side: name.removeprefix(f"{side} ") for side, name in best.items()}
    figures: dict[str, Any] = {"first_steps_seconds": first}
    rows = []
    for side, each in steps.items():
        values = {
            "seconds": statistics.median(s.seconds for s in each),
            "rollout_seconds": statistics.median(s.rollout for s in each),
            "training_seconds": statistics.median(s.seconds - s.rollout for s in each),
            "completion_tokens": statistics.median(s.tokens for s in each),
            "ms_per_completion_token": 1e3 * statistics.median(s.seconds / s.tokens for s in each),
        }
        figures[side] = {"dtype": chosen[side], "steps": [asdict(s) for s in each]} | values
        rows.append([side, chosen[side], *values.values()])
    ratios = {}
    if len(steps) == 2:
        seconds = {side: [s.seconds for s in each] for side, each in steps.items()}
        figures["ratio_of_rounds"] = ratio_of_rounds(seconds["trl"], seconds["rorqual"])
        for name, value in (("step/trl", "seconds"), ("step-per-token/trl", "ms_per_completion_token")):
            ratios[name] = figures["trl"][value] / figures["rorqual"][value]
    columns = ["", "precision", "s a step", "rollout s", "rest s", "completion tokens", "ms a token"]
    tries = [[side, dtype, s] for side, seconds in first.items() for dtype, s in seconds.items()]
    report(
        "rl_step",
        args,
        ratios,
        figures,
        [
            (f"GRPO step, SmolLM2-135M-Instruct, {sizes[0]} × {sizes[1]} completions", columns, rows),
            ("Early steps in each precision", ["side", "precision", "seconds"], tries),
        ],
        ["torch", "transformers", "trl"],
        field.failed,
        field.ours,
    )


if __name__ == "__main__":
    program(main)
