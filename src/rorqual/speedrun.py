"""The main job: from nothing to a small R1 in about ten minutes on two cores.

Documents made by generators → tokenizer → pre-training of a small V3-style mixture of experts → GRPO from there, as
R1-Zero → rejection sampling and fine-tuning on what was right → every stage on held-out problems → a report.
Each stage is the same code, and leaves the same folder, as the verb of its name.
"""

import json
import shutil
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from rorqual.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.evals.run import compare, evaluate, thinking_curve
from rorqual.model.checkpoint import save_model
from rorqual.plan.cost import parameters
from rorqual.reason.documents import LARGEST, line_is_right, write_documents
from rorqual.reason.environment import Environment, open_environment
from rorqual.reason.prompts import prompt_text
from rorqual.reason.rejection import NothingRight, distill
from rorqual.reason.rl import rl
from rorqual.recipe import EnvironmentSection, ModelSection, TokenizerSection, parse_recipe
from rorqual.report import write_report
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
        config={"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 2},
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

# Shares of the time for learning. The rest, about 0.35 on two cores, goes to documents, rejection sampling, reading the
# test problems at every stage, and the report.
PRETRAIN, RL = 0.39, 0.21
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


def speedrun(out: Path | None, seed: int, minutes: float) -> dict[str, Any]:
    """Run everything into `out` (default: a new folder in runs/) and give what summary.json holds."""
    if minutes < 0.5:
        raise UserError(f"--minutes {minutes:g}: at least 0.5 are needed")
    run_dir = out or _fresh(Path("runs"))
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir} is not empty; give another --out, or remove it")
    run_dir.mkdir(parents=True, exist_ok=True)
    story = Story(run_dir, seed, Plan(minutes))
    environments = [open_environment(section) for section in ENVIRONMENTS]

    start = time.monotonic()
    story.chapter("1. documents and tokenizer")
    _write_corpus(story, environments)
    story.timed("documents", start)

    stages = [("pretrain", _pretrain), ("rl", _reinforce), ("distill", _distill)]
    titles = {"pretrain": "2. pre-training", "rl": "3. reinforcement learning (GRPO)",
              "distill": "4. rejection sampling and fine-tuning"}  # fmt: skip
    for name, stage in stages:
        story.chapter(titles[name])
        start = time.monotonic()
        stage(story)
        story.timed(name, start)

    story.chapter("5. held-out problems, each stage")
    start = time.monotonic()
    summary = _evaluate(story, environments)
    story.timed("evaluate", start)
    shutil.copytree(run_dir / _folders(story)[-1][1] / "model", run_dir / "model")
    _recommend_sampling(run_dir / "model" / "generation_config.json")
    _finish(story, summary)
    return summary


def _fresh(parent: Path) -> Path:
    """runs/speedrun, or the first of runs/speedrun-2, -3, … that is free."""
    number = 1
    while (path := parent / ("speedrun" if number == 1 else f"speedrun-{number}")).exists():
        number += 1
    return path


def _write_corpus(story: Story, environments: list[Environment]) -> None:
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


def _pretrain(story: Story) -> None:
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


def _reinforce(story: Story) -> None:
    recipe = {
        "name": "rl",
        "out": str(story.run_dir),
        "seed": story.seed,
        "model": {"path": str(story.run_dir / "pretrain" / "model")},
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
        "eval_every": 20,
        "eval_problems": max(20, int(10 * story.plan.minutes)),
        "save_every": 100,
    }
    rl(parse_recipe(recipe, "rl", "speedrun"))


def _distill(story: Story) -> None:
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


def _evaluate(story: Story, environments: list[Environment]) -> dict[str, Any]:
    """Every stage's model on the same test problems, read for the first time now."""
    stages, results = [], {}
    options = {"template": TEMPLATE, "temperature": 1.0, "top_p": 1.0, "max_tokens": MAX_TOKENS, "seed": story.seed}
    for name, folder in _folders(story):
        engine = _engine(story.run_dir / folder)
        found = evaluate(
            engine, engine.tokenizer, environments, 8, story.plan.test_problems, check_line=line_is_right, **options
        )
        results[name] = found
        ledger = json.loads((story.run_dir / folder / "ledger.json").read_text())
        # Reinforcement learning books its tokens twice, once made and once learnt from.
        tokens = max(stage["tokens"] for stage in ledger["stages"].values())
        stages.append({"name": name, "seconds": story.seconds[name], "tokens": tokens, "tasks": found["tasks"]})
    budgets = [0, 16, 32, 64, 128, 192]
    few = max(50, story.plan.test_problems // 4)
    curve = {
        e.family: thinking_curve(engine, engine.tokenizer, e, budgets, samples=1, problems=few, **options)
        for e in environments
    }
    total, active = parameters(engine.model.config)
    return {
        "stages": stages,
        "gains": {after: compare(results[before], results[after]) for before, after in pairwise(results)},
        "thinking_curve": curve,
        "samples": _samples(story, environments),
        "seed": story.seed,
        "minutes": story.plan.minutes,
        "model": {"parameters_total": total, "parameters_active": active, "config": MODEL},
        "chat_command": f"rorqual chat {story.run_dir}/model",
    }  # fmt: skip


def _recommend_sampling(path: Path) -> None:
    """Chat samples as reinforcement learning did; past that length the model has never been."""
    own = json.loads(path.read_text())
    own |= {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": MAX_TOKENS}
    path.write_text(json.dumps(own, indent=2) + "\n")


def _folders(story: Story) -> list[tuple[str, str]]:
    """Stage and folder of every model there is."""
    every = [("pretrain", "pretrain"), ("rl", "rl"), ("distill", "distill/student")]
    return [(name, folder) for name, folder in every if (story.run_dir / folder / "model").exists()]


def _engine(folder: Path) -> Engine:
    # In FP32: at this size a decode step in BF16 is slower on a CPU, since oneDNN prepares every new batch size afresh.
    return Engine(folder / "model", slots=1024, dtype=torch.float32)


def _samples(story: Story, environments: list[Environment]) -> list[dict[str, str]]:
    """The same development problems answered before and after, for people to read."""
    rows = []
    for environment in environments:
        problems = environment.problems("dev", 3, story.seed)
        texts = []
        for folder in (_folders(story)[0][1], _folders(story)[-1][1]):
            engine = _engine(story.run_dir / folder)
            prompts = [prompt_text(p.question, TEMPLATE, engine.tokenizer) for p in problems]
            params = SamplingParams(max_tokens=MAX_TOKENS, seed=story.seed)
            texts.append(["<think>" + c.text for c in engine.generate(prompts, params)])
        rows += [
            {"family": p.family, "question": p.question, "before": before, "after": after}
            for p, before, after in zip(problems, *texts, strict=True)
        ]
    return rows


def _finish(story: Story, summary: dict[str, Any]) -> None:
    summary["total_seconds"] = time.monotonic() - story.started
    summary["seconds"] = story.seconds
    (story.run_dir / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False))
    page = write_report(story.run_dir)
    story.console.print(_table(summary))
    for family, gain in summary["gains"]["rl"].items():
        low, high = gain["interval"]
        story.console.print(
            f"{family}: reinforcement learning adds {100 * gain['gain']:.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
        )
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in story.seconds.items())
    story.console.print(f"{summary['total_seconds']:.0f} s in all: {spent}; {torch.get_num_threads()} threads")
    story.console.print(f"report: {page}\nchat:   {summary['chat_command']}", soft_wrap=True)


def _table(summary: dict[str, Any]) -> Table:
    """Stages by families: pass@1 with its interval, cons@8, pass@8."""
    table = Table(title="held-out problems, 8 samples each", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("stage", "family", "pass@1 %", "cons@8", "pass@8", "tokens", "says ✓", "✓ right"):
        table.add_column(name, justify="left" if name in ("stage", "family") else "right", no_wrap=True)
    for stage in summary["stages"]:
        for row, (family, r) in enumerate(stage["tasks"].items()):
            half = 50 * (r["interval"][1] - r["interval"][0])
            table.add_row(
                stage["name"] if row == 0 else "",
                family,
                f"{100 * r['pass_at_1']:.1f} ±{half:.1f}",
                _percent(r["cons_at_k"]),
                _percent(r["pass_at_k"]),
                f"{r['mean_tokens']:.0f}",
                _percent(r["verified_share"]),
                _percent(r["verdict_precision"]),
            )
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
