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
from workers import Field, answer, timed

LR, BETAS = 1e-6, (0.9, 0.999)
MOST_STEPS = 50
QUIET = {"TOKENIZERS_PARALLELISM": "false"}


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


@dataclass
class Step:
    """What one step took."""

    seconds: float
    rollout: float
    tokens: int


class Ours:
    def __init__(self, path: Path, dtype: str, questions: int, group: int, length: int) -> None:
        torch.manual_seed(0)
        self.trainer = trainer_of(path, dtype, questions, group, length)
        self.rollouts = timed(self.trainer.engine, "generate")

    def step(self) -> Step:
        tokens, start = self.trainer.tokens, time.perf_counter()
        self.trainer.step()
        return Step(time.perf_counter() - start, self.rollouts.pop(), self.trainer.tokens - tokens)


def trainer_of(path: Path, dtype: str, questions: int, group: int, length: int) -> GRPOTrainer:
    raw = {
        "name": "benchmark",
        "model": {"path": str(path), "dtype": dtype},
        "environments": [{"name": "sums"}],
        "reward": {"accuracy": 0.0, "format": 0.0, "verdict": 1.0},
        "grpo": {"group_size": group, "questions_per_step": questions, "kl": 0.0, "max_tokens": length},
        "optimizer": {"lr": LR, "betas": BETAS, "weight_decay": 0.0},
        "steps": 100,
    }
    return GRPOTrainer(
        load_model(path, dtype=torch.float32),
        load_tokenizer(path),
        [Sums()],
        parse_recipe(raw, RLRecipe),
        verdict=lambda sample, _: reward(sample.text, sample.problem.answer),
    )


class TRL:
    """TRL's trainer, whose loop waits after each step. `dtype` autocast: FP32 weights under BF16."""

    def __init__(self, *settings: Any) -> None:
        self.settings = settings

    def step(self) -> None:
        """The first time only; its loop answers that and what is asked after it."""
        torch.manual_seed(0)
        trl_loop(*self.settings)


def trl_loop(path: Path, dtype: str, questions: int, group: int, length: int) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    size = questions * group
    problems = [p for p in map(problem, range(2 * questions * MOST_STEPS)) if p.split == "train"]
    rows = [{"prompt": [{"role": "user", "content": p.question}], "answer": p.answer} for p in problems]
    tokens: list[int] = []

    def score(completions: list, completion_ids: list, answer: list[str], **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [reward(c[0]["content"], a) for c, a in zip(completions, answer, strict=True)]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            answer(Step(time.perf_counter() - self.start, rollouts.pop(), tokens.pop()))

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
