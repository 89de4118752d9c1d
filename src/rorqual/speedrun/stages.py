"""The training stages of the speedrun: each builds a recipe and runs it as the verb of its name does."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from rorqual.checkpoint.huggingface import save_model
from rorqual.console import output
from rorqual.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from rorqual.engine import Engine
from rorqual.evals.evaluate import evaluate
from rorqual.recipe import DistillRecipe, ModelSection, PretrainRecipe, RLRecipe, TokenizerSection, parse_recipe
from rorqual.rl.distillation import NoCorrectSamples, distill
from rorqual.rl.envs.registry import Environment
from rorqual.rl.rl_run import rl
from rorqual.speedrun.documents import LARGEST, write_documents
from rorqual.speedrun.level import BATCH, LENGTH, MODEL, OPTIMIZER, Level
from rorqual.train.build_model import build_model
from rorqual.train.number_init import start_numbers
from rorqual.train.training_run import pretrain

# As DeepSeek's template for R1: the prompt opens the thinking.
CHAT_TEMPLATE = "{{ messages[-1]['content'] }}\n{% if add_generation_prompt %}<think>{% endif %}"
TEMPLATE = "plain"

# End of each stage, as fractions of the time budget. The preparation is part of pre-training's time.
PRETRAIN_END, RL_END, DISTILL_END, END = 0.42, 0.76, 0.80, 0.985
PRETRAIN_SHARE = PRETRAIN_END - 0.025  # without measuring and writing documents
MIN_RL_ACCURACY = 0.04  # below this accuracy in all families, RL has nothing to reward
MIN_RL_TOKENS = (
    1.8e6  # of pre-training; RL of a minute or two learned nothing after 1.4 M tokens, and improved after 2.2 M
)
# Below this accuracy nearly every ✓ is false, and a verdict reward collapses training: 6 % became 0 in 40 steps.
VERDICT_ACCURACY = 0.2
MAX_NUM_SEQS = 1024  # sequences decoded at once
CHECK_SAMPLES = 4  # answers to a development problem


@dataclass
class Budget:
    """The wall time budget of a run, from `started` to the end of its report."""

    minutes: float
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return 60 * self.minutes

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    def left(self, until: float = 1.0) -> float:
        """Seconds until the fraction `until` of the budget is used; at least 1 % of the budget."""
        return max(until * self.seconds - self.spent, 0.01 * self.seconds)


@dataclass
class Check:
    """A short evaluation on development problems: accuracy and mean tokens per family, and sampling speed."""

    accuracy: dict[str, float]
    length: dict[str, float]
    tokens_per_second: float

    @property
    def weak(self) -> bool:
        """Whether the accuracy is too low for RL to have rewards."""
        return max(self.accuracy.values()) < MIN_RL_ACCURACY


@dataclass
class SpeedrunState:
    """Inputs and results of the stages, from which summary.json is made."""

    run_dir: Path
    seed: int
    budget: Budget
    level: Level
    environments: list[Environment]
    speed: float  # tokens/s of pre-training, measured at the start
    seconds: dict[str, float] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # shown with the results
    console: Console = field(default_factory=output)

    def announce(self, title: str) -> None:
        """Print a stage's title and the time so far."""
        self.console.print(f"[bold]{title}[/bold]  [dim]{self.budget.spent:.0f} s[/dim]")

    def timed(self, name: str, start: float) -> None:
        """Add the time since `start` (monotonic) to a stage."""
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def note(self, sentence: str) -> None:
        """Print a sentence and keep it for the report."""
        self.notes.append(sentence)
        self.console.print(f"   [yellow]{sentence}[/yellow]", soft_wrap=True)


def folders(state: SpeedrunState) -> list[tuple[str, str]]:
    """(stage, folder) of each trained model."""
    pretrained = "pretrain/more" if (state.run_dir / "pretrain/more/model").exists() else "pretrain"
    every = [("pretrain", pretrained), ("rl", "rl"), ("distill", "distill/student")]
    return [(name, folder) for name, folder in every if (state.run_dir / folder / "model").exists()]


def open_engine(folder: Path) -> Engine:
    return Engine(folder / "model", max_num_seqs=MAX_NUM_SEQS)


def write_corpus(state: SpeedrunState) -> None:
    """Write the documents (fewer in runs below ten minutes) and train the tokenizer."""
    path, counts = state.run_dir / "documents.jsonl", document_counts(state)
    problems = [max(500, count // 4) for count in counts]
    count = write_documents(path, state.environments, counts, problems, state.seed)
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(4000), strict=False)]
    special = ["<think>", "</think>", "<answer>", "</answer>"]
    size = LARGEST + 300
    section = TokenizerSection(vocab_size=size, whole_numbers=LARGEST + 1, special_tokens=special)
    tokenizer = train_tokenizer(texts, section)
    tokenizer.chat_template = CHAT_TEMPLATE
    save_tokenizer(tokenizer, state.run_dir / "tokenizer")
    state.console.print(f"   {count:,} documents, vocabulary of {len(tokenizer)} tokens")


def document_counts(state: SpeedrunState) -> list[int]:
    """Of each environment."""
    return [int(count * min(1.0, state.budget.minutes / 10)) for count in state.level.documents]


def pretrain_small(state: SpeedrunState) -> None:
    """Pre-train from random weights; where the model is then too weak for RL, also use the time of RL."""
    run_dir = state.run_dir
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    model = build_model(ModelSection(config=MODEL), tokenizer, state.seed)
    start_numbers(model, tokenizer)
    save_model(model, run_dir / "start", tokenizer)
    _pretrain(state, run_dir / "start", run_dir, "pretrain", PRETRAIN_END)
    check(state, "pretrain")
    if state.checks["pretrain"].weak:
        best = max(state.checks["pretrain"].accuracy.values())
        state.note(
            f"pre-training was too short: accuracy is {best:.1%}, and reinforcement learning needs about "
            f"{MIN_RL_ACCURACY:.0%}; its time is used for pre-training. Use --minutes {needed(state)}"
        )
        _pretrain(state, run_dir / "pretrain" / "model", run_dir / "pretrain", "more", RL_END)
        check(state, "pretrain")


def needed(state: SpeedrunState) -> int:
    """Minutes that this machine needs for enough pre-training."""
    enough = math.ceil(MIN_RL_TOKENS / (60 * PRETRAIN_SHARE * state.speed))
    return max(enough, math.ceil(1.5 * state.budget.minutes))


def _pretrain(state: SpeedrunState, start: Path, out: Path, name: str, until: float) -> None:
    recipe = {
        "name": name,
        "device": "cpu",
        "out": str(out),
        "seed": state.seed,
        "model": {"path": str(start)},
        "data": {
            "sources": [{"path": str(state.run_dir / "documents.jsonl")}],
            "sequence_length": LENGTH,
            "isolate_documents": True,
            "valid_fraction": 0.005,
        },
        "optimizer": OPTIMIZER,
        "schedule": {"name": "wsd", "warmup": 0.02, "decay": 0.4, "final": 0.02},
        "mtp": {"weight": 0.3, "final_weight": 0.0, "switch_at": 0.3},
        "train": {"seconds": state.budget.left(until), "batch_size": BATCH, "eval_every": 200, "save_every": 1000},
    }
    pretrain(parse_recipe(recipe, PretrainRecipe, "speedrun"))


def reinforce(state: SpeedrunState) -> None:
    """GRPO on all environments, until RL_END."""
    best = max(state.checks["pretrain"].accuracy.values())
    recipe = {
        "name": "rl",
        "device": "cpu",
        "out": str(state.run_dir),
        "seed": state.seed,
        "model": {"path": str(state.run_dir / folders(state)[-1][1] / "model")},
        "environments": _sections(state),
        "template": TEMPLATE,
        "reward": {"accuracy": 1.0, "format": 0.1, "verdict": 0.2 if best > VERDICT_ACCURACY else 0.0},
        "grpo": {
            "group_size": 16,
            "questions_per_step": 16,
            "kl": 0.0,
            "average": "token",
            "drop_zero_std_groups": True,
            "clip_high": 0.28,
            "max_tokens": state.level.max_tokens,
            "rollout_max_num_seqs": MAX_NUM_SEQS,
        },
        "optimizer": {"name": "muon", "lr": 2e-4, "muon_lr": 5e-4, "weight_decay": 0.0},
        "seconds": state.budget.left(RL_END),
        "warmup_steps": 3,
        "decay": 0.3,
        "eval_every": 40,
        "eval_problems": max(20, min(200, int(20 * state.budget.minutes))),
        "save_every": 100,
        "keep_start": True,
    }
    rl(parse_recipe(recipe, RLRecipe, "speedrun"))
    if kept_start(state.run_dir / "rl"):
        state.note(
            "reinforcement learning ended below its start, so the start is kept: it needs more time or a better "
            f"pre-trained model; use --minutes {needed(state)}"
        )
    check(state, "rl")


def kept_start(run_dir: Path) -> bool:
    """Whether RL released its initial model, since its last evaluation was below its first (`keep_start`)."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    found = [[value for key, value in line.items() if key.startswith("eval_")] for line in lines]
    sums = [sum(values) for values in found if values]
    return sums[-1] < sums[0]


def distill_best(state: SpeedrunState) -> None:
    """Rejection sampling from the RL model, then fine-tuning on correct answers; as many problems as time allows."""
    teacher, checked = str(state.run_dir / "rl" / "model"), state.checks["rl"]
    length = sum(checked.length.values()) / len(checked.length)
    problems = 0.6 * state.budget.left(DISTILL_END) * checked.tokens_per_second / (8 * length)
    recipe = {
        "name": "distill",
        "device": "cpu",
        "out": str(state.run_dir),
        "seed": state.seed,
        "teacher": teacher,
        "model": {"path": teacher},
        "environments": _sections(state),
        "template": TEMPLATE,
        "problems": int(min(1000, max(20, problems))),
        "samples": 8,
        "keep_per_problem": 2,
        "max_tokens": state.level.max_tokens,
        "sequence_length": state.level.max_tokens + 64,
        "optimizer": {"name": "muon", "lr": 1e-4, "muon_lr": 3e-4, "weight_decay": 0.0},
        "train": {"epochs": 2, "batch_size": 16},
    }
    try:
        distill(parse_recipe(recipe, DistillRecipe, "speedrun"))
    except NoCorrectSamples as e:  # a run of a minute or two
        state.note(f"distillation is skipped: {e}")


def check(state: SpeedrunState, stage: str) -> None:
    """Evaluate the newest model on a few development problems and print the accuracy."""
    engine = open_engine(state.run_dir / folders(state)[-1][1])
    problems, samples = check_problems(state), CHECK_SAMPLES
    start = time.monotonic()
    found = evaluate(
        engine, state.environments, samples, problems, split="dev", quiet=True, **sampling(state)
    ).tasks  # fmt: skip
    length = {family: result.mean_tokens for family, result in found.items()}
    tokens = problems * samples * sum(length.values())
    accuracy = {family: result.pass_at_1 for family, result in found.items()}
    state.checks[stage] = Check(accuracy, length, tokens / (time.monotonic() - start))
    shares = ", ".join(f"{family} {share:.0%}" for family, share in accuracy.items())
    state.console.print(f"   accuracy on development problems: {shares}")


def check_problems(state: SpeedrunState) -> int:
    """Of each family."""
    return max(8, min(48, int(5 * state.budget.minutes)))


def sampling(state: SpeedrunState) -> dict[str, Any]:
    """The sampling parameters of RL."""
    return {"template": TEMPLATE, "temperature": 1.0, "top_p": 1.0, "max_tokens": state.level.max_tokens,
            "seed": state.seed}  # fmt: skip


def _sections(state: SpeedrunState) -> list[dict[str, Any]]:
    return [section.model_dump() for section in state.level.environments]
