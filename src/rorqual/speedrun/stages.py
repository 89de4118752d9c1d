"""The stages of the speedrun: what each writes down as a recipe, and runs by the code of the verb of its name."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from rorqual.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from rorqual.model.checkpoint import save_model
from rorqual.reason.documents import LARGEST, write_documents
from rorqual.reason.environment import Environment
from rorqual.reason.rejection import NothingRight, distill
from rorqual.reason.rl import rl
from rorqual.recipe import EnvironmentSection, ModelSection, TokenizerSection, parse_recipe
from rorqual.train.numbers import start_numbers
from rorqual.train.prepare import build_model
from rorqual.train.pretrain import pretrain

# As DeepSeek's own template for R1: the assistant's turn begins inside the thinking.
CHAT_TEMPLATE = "{{ messages[-1]['content'] }}\n{% if add_generation_prompt %}<think>{% endif %}"
TEMPLATE = "plain"

ENVIRONMENTS = [
    EnvironmentSection(
        name="countdown",
        config={"min_numbers": 3, "max_numbers": 3, "min_value": 1, "max_value": 25,
                "min_target": 1, "max_target": 100, "operators": ["+", "-", "*"]},
        prompt="make {target} from {numbers}",
        weight=2.0,
    ),
    EnvironmentSection(
        name="chain_sum",
        config={"min_terms": 6, "max_terms": 7, "min_digits": 1, "max_digits": 2},
        prompt="calculate {expression}",
    ),
]  # fmt: skip

MODEL = {
    "model_type": "deepseek_v3",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
}

# Shares of the time for learning. About 0.2 more on two cores goes to documents, rejection sampling, reading the test
# problems at every stage, and the report.
PRETRAIN, RL = 0.4, 0.3
MAX_TOKENS = 224


@dataclass
class Plan:
    """What a run of so many minutes does: the ten-minute one, scaled."""

    minutes: float

    @property
    def seconds(self) -> float:
        return 60 * self.minutes

    @property
    def documents(self) -> list[int]:
        return [int(n * min(1.0, self.minutes / 10)) for n in (60_000, 30_000)]

    @property
    def problems(self) -> list[int]:
        return [max(500, n // 4) for n in self.documents]

    @property
    def test_problems(self) -> int:
        return int(min(1000, 100 * self.minutes))


@dataclass
class Story:
    """What the stages leave behind, on its way to summary.json."""

    run_dir: Path
    seed: int
    plan: Plan
    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    console: Console = field(default_factory=lambda: Console(highlight=False))

    def chapter(self, title: str) -> "Story":
        self.console.print(f"[bold]{title}[/bold]  [dim]{time.monotonic() - self.started:.0f} s[/dim]")
        return self

    def timed(self, name: str, start: float) -> None:
        self.seconds[name] = time.monotonic() - start


def write_corpus(story: Story, environments: list[Environment]) -> None:
    plan, path = story.plan, story.run_dir / "documents.jsonl"
    count = write_documents(path, environments, plan.documents, plan.problems, story.seed)
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(4000), strict=False)]
    special = ["<think>", "</think>", "<answer>", "</answer>"]
    section = TokenizerSection(vocab_size=LARGEST + 300, whole_numbers=LARGEST + 1, special_tokens=special)
    tokenizer = train_tokenizer(texts, section)
    tokenizer.chat_template = CHAT_TEMPLATE
    save_tokenizer(tokenizer, story.run_dir / "tokenizer")
    story.console.print(f"   {count:,} documents, {len(tokenizer)} tokens in the vocabulary")


def pretrain_small(story: Story) -> None:
    run_dir = story.run_dir
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    model = build_model(ModelSection(config=MODEL), tokenizer, story.seed)
    start_numbers(model, tokenizer)
    save_model(model, run_dir / "start", tokenizer)
    recipe = {
        "name": "pretrain",
        "out": str(run_dir),
        "seed": story.seed,
        "model": {"path": str(run_dir / "start"), "dtype": "bfloat16"},
        "data": {
            "sources": [{"path": str(run_dir / "documents.jsonl")}],
            "sequence_length": 192,
            "isolate_documents": True,
            "valid_fraction": 0.005,
        },
        "optimizer": {"name": "muon", "lr": 2e-3, "muon_lr": 4e-3, "weight_decay": 0.01},
        "schedule": {"name": "wsd", "warmup": 0.02, "decay": 0.4, "final": 0.02},
        "mtp": {"weight": 0.3, "final_weight": 0.0, "switch_at": 0.3},
        "train": {"seconds": PRETRAIN * story.plan.seconds, "batch_size": 16, "eval_every": 200, "save_every": 1000},
    }
    pretrain(parse_recipe(recipe, "pretrain", "speedrun"))


def reinforce(story: Story) -> None:
    recipe = {
        "name": "rl",
        "out": str(story.run_dir),
        "seed": story.seed,
        "model": {"path": str(story.run_dir / "pretrain" / "model"), "dtype": "bfloat16"},
        "environments": [section.model_dump() for section in ENVIRONMENTS],
        "template": TEMPLATE,
        "reward": {"accuracy": 1.0, "format": 0.1, "verdict": 0.2},
        "grpo": {
            "group_size": 16,
            "questions_per_step": 16,
            "kl": 0.0,
            "average": "token",
            "drop_flat_groups": True,
            "clip_high": 0.28,
            "max_tokens": MAX_TOKENS,
            "rollout_slots": 1024,
        },
        "optimizer": {"name": "muon", "lr": 3e-4, "muon_lr": 1e-3, "weight_decay": 0.0},
        "seconds": RL * story.plan.seconds,
        "warmup_steps": 3,
        "decay": 0.3,
        "eval_every": 20,
        "eval_problems": max(20, int(10 * story.plan.minutes)),
        "save_every": 100,
    }
    rl(parse_recipe(recipe, "rl", "speedrun"))


def distill_best(story: Story) -> None:
    plan, teacher = story.plan, str(story.run_dir / "rl" / "model")
    recipe = {
        "name": "distill",
        "out": str(story.run_dir),
        "seed": story.seed,
        "teacher": teacher,
        "model": {"path": teacher},
        "environments": [section.model_dump() for section in ENVIRONMENTS],
        "template": TEMPLATE,
        "problems": int(30 * plan.minutes),
        "samples": 8,
        "keep_per_problem": 2,
        "max_tokens": MAX_TOKENS,
        "sequence_length": 256,
        "optimizer": {"name": "muon", "lr": 1e-4, "muon_lr": 3e-4, "weight_decay": 0.0},
        "train": {"epochs": 2, "batch_size": 16},
    }
    try:
        distill(parse_recipe(recipe, "distill", "speedrun"))
    except NothingRight as e:  # a run of a minute or two
        story.console.print(f"   left out: {e}")
