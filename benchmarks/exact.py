"""Reinforcement learning in the exact mode, against the default: what a step costs, and how many bits differ.

Two trainers of the same model take turns, one of them in the exact mode, which then goes on alone to --steps. Of every
step: the seconds of rollout and update, the share of tokens whose log-probability as sampled differs in any bit from
the trainer's, and the largest difference. Then the same for completions that are sampled in FP8, in 4 bits and in
BF16, against the FP32 trainer.
"""

import copy
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from common import arguments, program, report, take_turns
from rorqual.checkpoint.gguf_import import import_model
from rorqual.checkpoint.huggingface import load_model
from rorqual.data.tokenizer import load_tokenizer, train_tokenizer
from rorqual.engine import Engine, SamplingParams
from rorqual.model import ModelConfig, Transformer
from rorqual.precision.exact import make_exact
from rorqual.precision.fp8_twin import FP8Twin
from rorqual.precision.quantize import convert
from rorqual.recipe import RLRecipe, TokenizerSection, parse_recipe
from rorqual.rl.envs.environment import Environment, Problem
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.mismatch import Comparison
from rorqual.rl.rollout import Rollout, derived_seed, sample_groups
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.train import set_seed

SMALL: dict[str, Any] = {  # a mixture of experts with latent attention
    "model_type": "deepseek_v3", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 8, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
    "first_k_dense_replace": 1, "initializer_range": 0.05, "max_position_embeddings": 512,
}  # fmt: skip
TINY = SMALL | {"hidden_size": 64, "num_hidden_layers": 2, "moe_intermediate_size": 32, "kv_lora_rank": 32}
MODES = ("default", "exact")
TURNS = 10  # that are timed


class Sums(Environment):
    def __init__(self) -> None:
        super().__init__("sums", 1.0)

    def candidate(self, seed: int, index: int) -> Problem:
        a, b = (Random(seed + index).randint(11, 99) for _ in range(2))
        question = f"What is {a} + {b}? Explain every step, then give the answer."
        return Problem(question, str(a + b), str(index), "", "sums")

    def check(self, problem: Problem, answer: str) -> float:
        return float(answer == problem.answer)


def share_of_digits(sample: Any, _correct: bool) -> float:
    """A reward that no group is without."""
    return sum(map(str.isdigit, sample.text)) / max(len(sample.text), 1)


def models(source: str, quick: bool) -> dict[str, Callable[[], tuple[Transformer, Tokenizer]]]:
    def small() -> tuple[Transformer, Tokenizer]:
        text = [Sums().candidate(0, i).question for i in range(100)]
        tokenizer = train_tokenizer(text, TokenizerSection(vocab_size=320 if quick else 1024))
        set_seed(0)
        sizes = (TINY if quick else SMALL) | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        return Transformer(ModelConfig(**sizes)), tokenizer

    def smollm2() -> tuple[Transformer, Tokenizer]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            import_model(source, path)
            return load_model(path, torch.float32), load_tokenizer(path)

    return {"small mixture of experts": small} | ({} if quick else {source: smollm2})


def trainer_of(model: Transformer, tokenizer: Tokenizer, mode: str, sizes: dict[str, int]) -> GRPOTrainer:
    raw = {
        "name": "exact", "exact": mode == "exact", "model": {"path": "unused", "dtype": "float32"}, "steps": 1000,
        "environments": [{"name": "sums"}], "template": "plain", "optimizer": {"lr": 1e-6},
        "reward": {"accuracy": 0.0, "format": 0.0, "verdict": 1.0}, "grpo": {"kl": 0.0, **sizes},
    }  # fmt: skip
    return GRPOTrainer(copy.deepcopy(model), tokenizer, [Sums()], parse_recipe(raw, RLRecipe), verdict=share_of_digits)


def steps_of(model: Transformer, tokenizer: Tokenizer, turns: int, steps: int, sizes: dict[str, int]) -> dict[str, Any]:
    """By mode: seconds of each turn; of each step those of a token, differing share and largest difference."""
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    trainers = {mode: trainer_of(model, tokenizer, mode, sizes) for mode in MODES}

    def step(mode: str) -> float:
        trainer = trainers[mode]
        trained = trainer.trained_tokens
        metrics = trainer.step()
        found[mode].append({
            "rollout_seconds_a_token": 1 / metrics.rollout.rollout_tokens_per_second,
            "update_seconds_a_token": metrics.update_seconds / max(1, trainer.trained_tokens - trained),
            "mismatch_share": metrics.update.mismatch_share, "mismatch_max": metrics.update.mismatch_max,
        })  # fmt: skip
        return metrics.rollout_seconds + metrics.update_seconds

    seconds = take_turns({mode: lambda mode=mode: step(mode) for mode in MODES}, turns)
    for _ in range(steps - turns):
        step("exact")
    return {mode: {"seconds": seconds[mode][1:], "steps": found[mode]} for mode in MODES}  # the first warms up


def rounded(model: Transformer, tokenizer: Tokenizer, sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """Completions from other numbers than the trainer's: share of tokens that differ, mean and largest difference."""
    trainer = trainer_of(model, tokenizer, "default", sizes)
    samplers: dict[str, Callable[[], Transformer]] = {
        "fp32": lambda: copy.deepcopy(model),
        "bf16": lambda: copy.deepcopy(model).to(torch.bfloat16),
        "fp8": lambda: FP8Twin(copy.deepcopy(model)).model,
        "int4": lambda: convert(copy.deepcopy(model), "int4"),
    }
    params = SamplingParams(temperature=1.0, max_tokens=sizes["max_tokens"], n=sizes["group_size"], seed=0)
    problems = [Sums().candidate(derived_seed("exact"), i) for i in range(sizes["questions_per_step"])]
    found: dict[str, dict[str, float]] = {}
    for name, make in {**samplers, "exact": lambda: _exact(copy.deepcopy(model))}.items():
        rollout = sample_groups(Engine(make().eval(), tokenizer), problems, "plain", params)
        if name == "exact":
            trainer = trainer_of(model, tokenizer, "exact", sizes)
        found[name] = _compared(trainer, rollout)
    return found


def _compared(trainer: GRPOTrainer, rollout: Rollout) -> dict[str, float]:
    before = trainer.update.logprobs_before(rollout, list(range(len(rollout.completions))))
    trained, sampled = (torch.tensor([p for own in x for p in own]) for x in (before, rollout.logprobs))
    comparison = Comparison()
    comparison.add(trained, sampled)
    mean = float((trained - sampled).abs().mean())
    return {"share": comparison.differing / comparison.tokens, "mean": mean, "largest": comparison.largest}


def _exact(model: Transformer) -> Transformer:
    make_exact(model)
    return model


def main() -> None:
    args = arguments(__doc__, model="smollm2", steps="100 (quick: 4)", threads="0 (all)")
    if args.threads.isdecimal() and int(args.threads):
        torch.set_num_threads(int(args.threads))
    steps = int(args.steps) if args.steps.isdecimal() else 4 if args.quick else 100
    turns = min(steps, 3 if args.quick else TURNS)
    sizes = {"questions_per_step": 2, "group_size": 3, "max_tokens": 12} if args.quick else {
        "questions_per_step": 4, "group_size": 8, "max_tokens": 48,
    }  # fmt: skip
    figures: dict[str, Any] = {"steps": steps, "turns": turns}
    ratios: dict[str, float] = {}
    costs: list[list[Any]] = []
    differences: list[list[Any]] = []
    for name, make in models(args.model, args.quick).items():
        model, tokenizer = make()
        modes, others = steps_of(model, tokenizer, turns, steps, sizes), rounded(model, tokenizer, sizes)
        figures[name] = {"modes": modes, "rounded": others}
        medians: dict[str, list[float]] = {}
        for mode, own in modes.items():
            own_steps = own["steps"][1:turns]
            parts = [
                statistics.median(s[f"{part}_seconds_a_token"] for s in own_steps) for part in ("rollout", "update")
            ]
            medians[mode] = [statistics.median(own["seconds"]), *parts]
            compared = [s for s in own["steps"] if s["mismatch_share"] is not None]
            share = statistics.mean(s["mismatch_share"] for s in compared)
            largest = max(s["mismatch_max"] for s in compared)
            costs.append([f"{name}, {mode}", medians[mode][0], *(1e3 * x for x in parts), share, largest])
        for part, default, exact in zip(
            ("step", "rollout", "update"), medians["default"], medians["exact"], strict=True
        ):
            ratios[f"{part}/exact, {name}"] = default / exact
        differences += [[f"{name}, {form}", x["share"], x["mean"], x["largest"]] for form, x in others.items()]
        print(f"{name}: done", file=sys.stderr, flush=True)
    report(
        "exact", args, ratios, figures,
        [
            (f"GRPO, {turns} turns, and {steps} steps in the exact mode",
             ["mode", "s a step", "rollout, ms a token", "update, ms a token", "tokens that differ", "largest"], costs),
            ("Log-probabilities as sampled, against the FP32 trainer's",
             ["rollouts", "tokens that differ", "mean |difference|", "largest"], differences),
        ],
        ["torch"],
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
