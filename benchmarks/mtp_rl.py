"""What RL does to the acceptance of the multi-token module's drafts, with the module trained along and without.

A small V3-style network learns to write sums by next-token and multi-token prediction, then RL moves it away from that
by a reward for one digit. Drafts are sampled as in the rollouts, before RL and after it, on the same prompts.
"""

import copy

import torch

from common import arguments, program, report
from rorqual.data.loader import Batch
from rorqual.data.special_tokens import encode
from rorqual.data.tokenizer import train_tokenizer
from rorqual.engine import Engine, SamplingParams
from rorqual.model import ModelConfig, Transformer
from rorqual.recipe import (
    BalanceSection,
    MTPSection,
    OptimizerSection,
    RLRecipe,
    ScheduleSection,
    TokenizerSection,
    parse_recipe,
)
from rorqual.rl.envs.environment import Environment, Problem
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.rewards import Sample
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.train.trainer import Trainer

LENGTH, ROWS, TOKENS = 48, 16, 24


class Sums(Environment):
    """a+b= for small numbers; what counts is the verdict below."""

    def candidate(self, seed: int, index: int) -> Problem:
        a, b = index * 7 % 50, (index + seed) % 40
        return Problem(f"{a}+{b}=", str(a + b), f"{a} {b}", "", self.family)

    def check(self, problem: Problem, answer: str) -> float:
        return float(answer == problem.answer)


def share_of_sevens(sample: Sample, _correct: bool) -> float:
    return sample.text.count("7") / sample.length


def pretrained(tokenizer: Tokenizer, quick: bool) -> Transformer:
    torch.manual_seed(0)
    size = 64 if quick else 192
    config = ModelConfig(
        model_type="deepseek_v3", vocab_size=len(tokenizer), hidden_size=size, intermediate_size=3 * size,
        num_hidden_layers=3, num_attention_heads=4, kv_lora_rank=size // 4, qk_nope_head_dim=16, qk_rope_head_dim=16,
        v_head_dim=16, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=size,
        first_k_dense_replace=1, num_nextn_predict_layers=1, max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Transformer(config)
    trainer = Trainer(
        model, OptimizerSection(lr=2e-3), ScheduleSection(), MTPSection(), BalanceSection(), dtype="float32"
    )
    generator = torch.Generator().manual_seed(0)
    steps = 30 if quick else 400
    for step in range(steps):
        rows: list[list[int]] = []
        for a, b in torch.randint(0, 50, (ROWS, 2), generator=generator).tolist():
            text = "".join(f"{a + i}+{b}={a + b + i}\n" for i in range(LENGTH))
            rows.append(encode(text, tokenizer)[: LENGTH + 1])
        tokens = torch.tensor(rows)
        places = torch.arange(LENGTH).expand(ROWS, LENGTH)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(ROWS, LENGTH), places, None)
        trainer.step([batch], step / steps)
    return model


def acceptance(model: Transformer, tokenizer: Tokenizer, count: int) -> float:
    """Share of the module's drafts that the model accepts."""
    engine = Engine(model.eval(), tokenizer, speculative="mtp")
    prompts = [f"{i * 3 % 50}+{i % 40}=" for i in range(count)]
    for i, prompt in enumerate(prompts):
        engine.generate([prompt], SamplingParams(max_tokens=TOKENS, seed=i, ignore_eos=True))
    counters = engine.status().counters
    return counters.accepted_tokens / max(counters.draft_tokens, 1)


def recipe(weight: float, seed: int, steps: int) -> RLRecipe:
    return parse_recipe(
        {
            "name": "mtp", "model": {"path": "in memory"}, "environments": [{"name": "sums"}], "template": "plain",
            "steps": steps, "seed": seed, "reward": {"accuracy": 0.0, "format": 0.0, "verdict": 1.0},
            "optimizer": {"lr": 1e-3}, "mtp": {"weight": weight},
            "grpo": {"group_size": 8, "questions_per_step": 4, "max_tokens": TOKENS, "kl": 0.0},
        },
        RLRecipe,
    )  # fmt: skip


def main() -> None:
    args = arguments(__doc__)
    section = TokenizerSection(vocab_size=300, special_tokens=["<think>", "</think>", "<answer>", "</answer>"])
    tokenizer = train_tokenizer(["1 + 2 = 3"], section)
    start = pretrained(tokenizer, args.quick)
    steps, count, seeds = (4, 4, (0,)) if args.quick else (60, 64, (0, 1, 2))
    before = acceptance(start, tokenizer, count)
    rows, ratios, runs = [["before RL", "", before, ""]], dict[str, float](), []
    for seed in seeds:
        ends: dict[float, float] = {}
        for weight in (0.0, 0.3):
            model = copy.deepcopy(start)
            trainer = GRPOTrainer(
                model, tokenizer, [Sums("sums", 1.0)], recipe(weight, seed, steps), verdict=share_of_sevens
            )
            reward = [trainer.step(i / steps).rollout.reward for i in range(steps)][-1]
            ends[weight] = acceptance(model, tokenizer, count)
            rows.append([f"after, mtp.weight = {weight}", str(seed), ends[weight], reward])
            runs.append({"weight": weight, "seed": seed, "acceptance": ends[weight], "reward": reward})
        ratios[f"acceptance-seed-{seed}/without"] = ends[0.3] / max(ends[0.0], 1e-9)
    report(
        "mtp_rl", args, ratios, {"before": before, "runs": runs, "steps": steps},
        [(f"Drafts accepted, {steps} steps of GRPO", ["when", "seed", "acceptance", "reward"], rows)], ["torch"],
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
