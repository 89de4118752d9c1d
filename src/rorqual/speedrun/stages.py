"""The stages of the speedrun: what each writes down as a recipe, and runs by the code of the verb of its name."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from rorqual.checkpoint.huggingface import save_model
from rorqual.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from rorqual.engine import Engine
from rorqual.evals.evaluate import evaluate
from rorqual.recipe import ModelSection, TokenizerSection, parse_recipe
from rorqual.rl.envs.registry import Environment
from rorqual.rl.rejection_sampling import NothingRight, distill
from rorqual.rl.rl_run import rl
from rorqual.speedrun.documents import LARGEST, write_documents
from rorqual.speedrun.level import BATCH, LENGTH, MODEL, OPTIMIZER, Level
from rorqual.train.build_model import build_model
from rorqual.train.number_init import start_numbers
from rorqual.train.pretrain import pretrain

# As DeepSeek's own template for R1: the assistant's turn begins inside the thinking.
CHAT_TEMPLATE = "{{ messages[-1]['content'] }}\n{% if add_generation_prompt %}<think>{% endif %}"
TEMPLATE = "plain"

# When stages end, as shares of the whole time. What comes before them takes its time out of pre-training's.
PRETRAIN_END, RL_END, DISTILL_END, END = 0.42, 0.76, 0.80, 0.985
PRETRAIN_SHARE = PRETRAIN_END - 0.025  # what is left of it after measuring and writing documents
FLOOR = 0.04  # where less of the answers of every family is right, RL has nothing to reward
ENOUGH = 1.8e6  # tokens of pre-training; RL of a minute or two found nothing from 1.4 M on, and climbed from 2.2 M on
# Where less is right, nearly every ✓ is false, and a price on that teaches to claim and solve nothing: 6 % right became
# none in 40 steps.
SURE = 0.2
SLOTS = 1024  # sequences sampled at a time


@dataclass
class Budget:
    """The wall time of a run, from `started` to the end of its report."""

    minutes: float
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return 60 * self.minutes

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    def left(self, until: float = 1.0) -> float:
        """Seconds until a share of the whole time is over."""
        return max(until * self.seconds - self.spent, 0.01 * self.seconds)


@dataclass
class Check:
    """A glance at development problems: shares of right answers and mean tokens of a family, and how fast it went."""

    right: dict[str, float]
    length: dict[str, float]
    tokens_per_second: float

    @property
    def weak(self) -> bool:
        """Whether so little is right that reinforcement learning has nothing to reward."""
        return max(self.right.values()) < FLOOR


@dataclass
class SpeedrunState:
    """What the stages leave behind, on its way to summary.json."""

    run_dir: Path
    seed: int
    budget: Budget
    level: Level
    environments: list[Environment]
    speed: float  # tokens/s of pre-training, measured at the start
    seconds: dict[str, float] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what a reader of the result must know
    console: Console = field(default_factory=lambda: Console(highlight=False))

    def chapter(self, title: str) -> "SpeedrunState":
        self.console.print(f"[bold]{title}[/bold]  [dim]{self.budget.spent:.0f} s[/dim]")
        return self

    def timed(self, name: str, start: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)
        self.console.print(f"   [yellow]{sentence}[/yellow]", soft_wrap=True)


def folders(story: SpeedrunState) -> list[tuple[str, str]]:
    """Stage and folder of every model there is."""
    pretrained = "pretrain/more" if (story.run_dir / "pretrain/more/model").exists() else "pretrain"
    every = [("pretrain", pretrained), ("rl", "rl"), ("distill", "distill/student")]
    return [(name, folder) for name, folder in every if (story.run_dir / folder / "model").exists()]


def open_engine(folder: Path) -> Engine:
    return Engine(folder / "model", max_num_seqs=SLOTS)


def write_corpus(story: SpeedrunState) -> None:
    """Documents, fewer in a short run, and the tokenizer."""
    level, path = story.level, story.run_dir / "documents.jsonl"
    counts = [int(count * min(1.0, story.budget.minutes / 10)) for count in level.documents]
    problems = [max(500, count // 4) for count in counts]
    count = write_documents(path, story.environments, counts, problems, story.seed)
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(4000), strict=False)]
    special = ["<think>", "</think>", "<answer>", "</answer>"]
    size = LARGEST + 300
    section = TokenizerSection(vocab_size=size, whole_numbers=LARGEST + 1, special_tokens=special)
    tokenizer = train_tokenizer(texts, section)
    tokenizer.chat_template = CHAT_TEMPLATE
    save_tokenizer(tokenizer, story.run_dir / "tokenizer")
    story.console.print(f"   {count:,} documents, {len(tokenizer)} tokens in the vocabulary")


def pretrain_small(story: SpeedrunState) -> None:
    """Pre-train from random weights; where that leaves nothing for RL to reward, with the time of RL too."""
    run_dir = story.run_dir
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    model = build_model(ModelSection(config=MODEL), tokenizer, story.seed)
    start_numbers(model, tokenizer)
    save_model(model, run_dir / "start", tokenizer)
    _pretrain(story, run_dir / "start", run_dir, "pretrain", PRETRAIN_END)
    check(story, "pretrain")
    if story.checks["pretrain"].weak:
        best = max(story.checks["pretrain"].right.values())
        story.note(
            f"pre-training fell short: {best:.1%} of the answers are right, and reinforcement learning needs about "
            f"{FLOOR:.0%} to begin with; its time goes to pre-training. Give the run --minutes {needed(story)}"
        )
        _pretrain(story, run_dir / "pretrain" / "model", run_dir / "pretrain", "more", RL_END)
        check(story, "pretrain")


def needed(story: SpeedrunState) -> int:
    """Minutes in which this machine pre-trains far enough."""
    enough = math.ceil(ENOUGH / (60 * PRETRAIN_SHARE * story.speed))
    return max(enough, math.ceil(1.5 * story.budget.minutes))


def _pretrain(story: SpeedrunState, start: Path, out: Path, name: str, until: float) -> None:
    recipe = {
        "name": name,
        "out": str(out),
        "seed": story.seed,
        "model": {"path": str(start)},
        "data": {
            "sources": [{"path": str(story.run_dir / "documents.jsonl")}],
            "sequence_length": LENGTH,
            "isolate_documents": True,
            "valid_fraction": 0.005,
        },
        "optimizer": OPTIMIZER,
        "schedule": {"name": "wsd", "warmup": 0.02, "decay": 0.4, "final": 0.02},
        "mtp": {"weight": 0.3, "final_weight": 0.0, "switch_at": 0.3},
        "train": {"seconds": story.budget.left(until), "batch_size": BATCH, "eval_every": 200, "save_every": 1000},
    }
    pretrain(parse_recipe(recipe, "pretrain", "speedrun"))


def reinforce(story: SpeedrunState) -> None:
    """GRPO on the families, until its share of the time is over."""
    best = max(story.checks["pretrain"].right.values())
    recipe = {
        "name": "rl",
        "out": str(story.run_dir),
        "seed": story.seed,
        "model": {"path": str(story.run_dir / folders(story)[-1][1] / "model")},
        "environments": _sections(story),
        "template": TEMPLATE,
        "reward": {"accuracy": 1.0, "format": 0.1, "verdict": 0.2 if best > SURE else 0.0},
        "grpo": {
            "group_size": 16,
            "questions_per_step": 16,
            "kl": 0.0,
            "average": "token",
            "drop_zero_std_groups": True,
            "clip_high": 0.28,
            "max_tokens": story.level.max_tokens,
            "rollout_max_num_seqs": SLOTS,
        },
        "optimizer": {"name": "muon", "lr": 2e-4, "muon_lr": 5e-4, "weight_decay": 0.0},
        "seconds": story.budget.left(RL_END),
        "warmup_steps": 3,
        "decay": 0.3,
        "eval_every": 40,
        "eval_problems": max(20, min(200, int(20 * story.budget.minutes))),
        "save_every": 100,
        "keep_start": True,
    }
    rl(parse_recipe(recipe, "rl", "speedrun"))
    if kept_start(story.run_dir / "rl"):
        story.note(
            "reinforcement learning ended below its start, which is kept: from here it needs more time, or a better "
            f"start; give the run --minutes {needed(story)}"
        )
    check(story, "rl")


def kept_start(run_dir: Path) -> bool:
    """Whether rl released what it began with, since its last evaluation was below its first (`keep_start`)."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    found = [[value for key, value in line.items() if key.startswith("eval_")] for line in lines]
    sums = [sum(values) for values in found if values]
    return sums[-1] < sums[0]


def distill_best(story: SpeedrunState) -> None:
    """Rejection sampling from the model that RL left, and fine-tuning on what was right: as many as there is time."""
    teacher, glance = str(story.run_dir / "rl" / "model"), story.checks["rl"]
    length = sum(glance.length.values()) / len(glance.length)
    problems = 0.6 * story.budget.left(DISTILL_END) * glance.tokens_per_second / (8 * length)
    recipe = {
        "name": "distill",
        "out": str(story.run_dir),
        "seed": story.seed,
        "teacher": teacher,
        "model": {"path": teacher},
        "environments": _sections(story),
        "template": TEMPLATE,
        "problems": int(min(1000, max(20, problems))),
        "samples": 8,
        "keep_per_problem": 2,
        "max_tokens": story.level.max_tokens,
        "sequence_length": story.level.max_tokens + 64,
        "optimizer": {"name": "muon", "lr": 1e-4, "muon_lr": 3e-4, "weight_decay": 0.0},
        "train": {"epochs": 2, "batch_size": 16},
    }
    try:
        distill(parse_recipe(recipe, "distill", "speedrun"))
    except NothingRight as e:  # a run of a minute or two
        story.note(f"left out: {e}")


def check(story: SpeedrunState, stage: str) -> None:
    """Ask the newest model some development problems, and say what came of it."""
    engine = open_engine(story.run_dir / folders(story)[-1][1])
    problems, samples = max(8, min(48, int(5 * story.budget.minutes))), 4
    start = time.monotonic()
    found = evaluate(
        engine, engine.tokenizer, story.environments, samples, problems, split="dev", quiet=True, **sampling(story)
    )["tasks"]  # fmt: skip
    length = {family: result["mean_tokens"] for family, result in found.items()}
    tokens = problems * samples * sum(length.values())
    right = {family: result["pass_at_1"] for family, result in found.items()}
    story.checks[stage] = Check(right, length, tokens / (time.monotonic() - start))
    shares = ", ".join(f"{family} {share:.0%}" for family, share in right.items())
    story.console.print(f"   right answers to development problems: {shares}")


def sampling(story: SpeedrunState) -> dict[str, Any]:
    """As reinforcement learning samples."""
    return {"template": TEMPLATE, "temperature": 1.0, "top_p": 1.0, "max_tokens": story.level.max_tokens,
            "seed": story.seed}  # fmt: skip


def _sections(story: SpeedrunState) -> list[dict[str, Any]]:
    return [section.model_dump() for section in story.level.environments]
