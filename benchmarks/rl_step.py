"""A GRPO step on SmolLM2-135M-Instruct against TRL's GRPOTrainer: same prompts, reward, optimizer and sampling.

A step is 8 questions with 8 completions each of up to 64 tokens, sampled, scored and learned from once, without a
reference model. Each side first takes a step in each of its precisions and goes on with its fastest; the two then
take turns. Since sampled lengths differ, seconds per completion token are given too.
"""

import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from common import arguments, program, ratio_of_rounds, report
from rorqual.data.tokenizer import load_tokenizer
from rorqual.model.checkpoint import load_model
from rorqual.model.gguf import import_model
from rorqual.reason.problems import Environment, Problem
from rorqual.reason.trainer import RLTrainer
from rorqual.recipe import parse_recipe

LR, BETAS = 1e-6, (0.9, 0.999)


def problem(index: int) -> Problem:
    a, b = (Random(index).randint(11, 99) for _ in range(2))
    question = f"What is {a} + {b}? Explain every step, then give the answer."
    return Problem(question, str(a + b), str(index), "", "sums")


def reward(text: str, answer: str) -> float:
    """1 when the last number is the answer, and the share of digits, so that no group is without signal."""
    numbers = re.findall(r"\d+", text)
    return float(bool(numbers) and numbers[-1] == answer) + sum(map(str.isdigit, text)) / max(len(text), 1)


class Sums(Environment):
    def __init__(self) -> None:
        super().__init__("sums", 1.0)

    def candidate(self, seed: int, index: int) -> Problem:
        return problem(index)

    def check(self, problem: Problem, answer: str) -> float:
        return float(answer == problem.answer)


class Step:
    """What one step took."""

    def __init__(self, seconds: float, rollout: float, tokens: int) -> None:
        self.seconds, self.rollout, self.tokens = seconds, rollout, tokens


def timed(owner: Any, name: str) -> list[float]:
    """Replaces a method by one that notes how long each call takes."""
    method, found = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            found.append(time.perf_counter() - start)

    setattr(owner, name, call)
    return found


def ours(path: Path, dtype: str, questions: int, group: int, length: int) -> Callable[[], Step]:
    raw = {
        "name": "benchmark",
        "model": {"path": str(path), "dtype": dtype},
        "environments": [{"name": "sums"}],
        "reward": {"accuracy": 0.0, "format": 0.0, "verdict": 1.0},
        "grpo": {"group_size": group, "questions_per_step": questions, "kl": 0.0, "max_tokens": length},
        "optimizer": {"lr": LR, "betas": BETAS, "weight_decay": 0.0},
        "steps": 100,
    }
    trainer = RLTrainer(
        load_model(path, dtype=torch.float32),
        load_tokenizer(path),
        [Sums()],
        parse_recipe(raw, "rl"),
        verdict=lambda sample, _: reward(sample.text, sample.problem.answer),
    )
    rollouts = timed(trainer.engine, "generate")

    def step() -> Step:
        tokens, start = trainer.tokens, time.perf_counter()
        trainer.step()
        return Step(time.perf_counter() - start, rollouts.pop(), trainer.tokens - tokens)

    return step


def trl_peer(
    path: Path, dtype: str, questions: int, group: int, length: int, steps: int, between: Callable[[], None]
) -> list[Step]:
    """TRL's steps; `between` is called after each, while TRL waits. `dtype` autocast: FP32 weights under BF16."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    size = questions * group
    problems = [p for p in map(problem, range(2 * questions * steps)) if p.split == "train"][: questions * steps]
    rows = [{"prompt": [{"role": "user", "content": p.question}], "answer": p.answer} for p in problems]
    tokens: list[int] = []

    def score(completions: list, completion_ids: list, answer: list[str], **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [reward(c[0]["content"], a) for c, a in zip(completions, answer, strict=True)]

    found: list[Step] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.append(Step(time.perf_counter() - self.start, rollouts.pop(), tokens.pop()))
            between()

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=min(size, 16),
            gradient_accumulation_steps=max(size // 16, 1),
            num_generations=group,
            max_completion_length=length,
            beta=0.0,
            loss_type="grpo",
            temperature=1.0,
            learning_rate=LR,
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
            processing_class=AutoTokenizer.from_pretrained(path),
            callbacks=[Clock()],
        )
        rollouts = timed(trainer, "_generate")
        trainer.train()
    return found


def main() -> None:
    args = arguments(__doc__)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.manual_seed(0)
    sizes = {"questions": 2, "group": 2, "length": 4} if args.quick else {"questions": 8, "group": 8, "length": 64}
    rounds = 1 if args.quick else 4
    kinds = {"rorqual": ["float32", "bfloat16"], "trl": ["float32", "autocast", "bfloat16"]}
    if args.quick:
        kinds = {side: ["float32"] for side in kinds}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "smollm2"
        import_model("smollm2", path)
        first: dict[str, dict[str, float]] = {"rorqual": {}, "trl": {}}
        for dtype in kinds["rorqual"]:
            step = ours(path, dtype, **sizes)
            step()
            first["rorqual"][dtype] = step().seconds
        for dtype in kinds["trl"]:
            first["trl"][dtype] = trl_peer(path, dtype, **sizes, steps=1, between=lambda: None)[0].seconds
        dtypes = {side: min(seconds, key=seconds.__getitem__) for side, seconds in first.items()}
        step, mine = ours(path, dtypes["rorqual"], **sizes), []
        theirs = trl_peer(path, dtypes["trl"], **sizes, steps=rounds, between=lambda: mine.append(step()))
    steps = {"rorqual": mine[1:] or mine, "trl": theirs[1:] or theirs}  # the first warms up
    figures: dict[str, Any] = {"first_steps_seconds": first}
    rows = []
    for side, found in steps.items():
        values = {
            "seconds": statistics.median(s.seconds for s in found),
            "rollout_seconds": statistics.median(s.rollout for s in found),
            "training_seconds": statistics.median(s.seconds - s.rollout for s in found),
            "completion_tokens": statistics.median(s.tokens for s in found),
            "ms_per_completion_token": 1e3 * statistics.median(s.seconds / s.tokens for s in found),
        }
        figures[side] = {"dtype": dtypes[side], "steps": [vars(s) for s in found]} | values
        rows.append([side, dtypes[side], *values.values()])
    of = partial(map, lambda s: s.seconds)
    figures["ratio_of_rounds"] = ratio_of_rounds(list(of(steps["trl"])), list(of(steps["rorqual"])))
    ratios = {
        "step/trl": figures["trl"]["seconds"] / figures["rorqual"]["seconds"],
        "step-per-token/trl": figures["trl"]["ms_per_completion_token"] / figures["rorqual"]["ms_per_completion_token"],
    }
    columns = ["", "precision", "s a step", "rollout s", "rest s", "completion tokens", "ms a token"]
    tries = [[side, dtype, s] for side, seconds in first.items() for dtype, s in seconds.items()]
    report(
        "rl_step",
        args,
        ratios,
        figures,
        [
            (f"GRPO step, SmolLM2-135M-Instruct, {sizes['questions']} × {sizes['group']} completions", columns, rows),
            ("Early steps in each precision", ["side", "precision", "seconds"], tries),
        ],
        ["torch", "transformers", "trl"],
    )


if __name__ == "__main__":
    program(main)
