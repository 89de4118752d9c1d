"""What a KV cache in 8 bits costs in accuracy, over long texts: FP8 and int8 against the dtype the model computes in.

Two models: SmolLM2-135M-Instruct (grouped-query attention), and a small network with latent attention, trained here on
bytes of Python's documentation. Forced: each cache reads the same texts of the documentation, which the small network
has not seen, and what it says of every token is compared with what the exact cache says: the share of positions with
the same most probable token, and the difference of the token's log-probability, by position. Free: how many tokens of a
greedy answer are the exact cache's, before the first that differs.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import torch

from common import arguments, fastest, program, report
from rorqual.checkpoint.gguf_import import import_model
from rorqual.checkpoint.huggingface import load_model
from rorqual.data.loader import Batch
from rorqual.data.tokenizer import load_tokenizer
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.block_manager import BLOCK
from rorqual.engine.prompt_logprobs import PromptLogprobs
from rorqual.kernels.dtypes import fastest_dtype
from rorqual.model import ModelConfig, Transformer
from rorqual.sections import OptimizerSection, ScheduleSection
from rorqual.train.trainer import Trainer

LATENT = ModelConfig(
    model_type="deepseek_v3", vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
    num_attention_heads=4, q_lora_rank=None, kv_lora_rank=144, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    max_position_embeddings=2048,
)  # fmt: skip
CACHES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
PROMPT = 32  # tokens before a greedy answer
BAND = 100  # positions of a row of the table

Texts = Sequence[Sequence[int]]


def train_latent(text: bytes, steps: int, batch: int, length: int) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(LATENT)
    trainer = Trainer(model, OptimizerSection(lr=3e-3), ScheduleSection(warmup=0.05, decay=0.5), dtype=fastest())
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    positions = torch.arange(length).expand(batch, length)
    for step in range(steps):
        starts = torch.randint(len(data) - length, (batch, 1))
        rows = data[starts + torch.arange(length + 1)]
        found = trainer.step(
            [Batch(rows[:, :-1], rows[:, 1:], torch.ones(batch, length), positions, None)], step / steps
        )
        if step % 50 == 0:
            print(f"step {step}: {found.loss:.2f} nats a byte", file=sys.stderr)
    return model.eval()


def forced(model: Transformer, cache: torch.dtype | None, texts: Texts) -> list[PromptLogprobs]:
    """What the model says of every token of the texts."""
    engine = Engine(model, kv_cache_dtype=cache)
    requests = [engine.score(text, 1) for text in texts]
    while not engine.idle:
        engine.step()
    return [r.prompt_logprobs for r in requests if r.prompt_logprobs]


def top_tokens(found: PromptLogprobs) -> list[int]:
    """The most probable token at every position from the second on."""
    return [ranked[0][0] for ranked in found.ranked[1:]]


def compare(found: list[PromptLogprobs], exact: list[PromptLogprobs]) -> list[dict[str, float]]:
    """By bands of positions: same top token, and mean and 99th percentile of the differences in log-probability."""
    difference = torch.tensor([f.logprobs[1:] for f in found]) - torch.tensor([e.logprobs[1:] for e in exact])
    same = torch.tensor([top_tokens(f) for f in found]) == torch.tensor([top_tokens(e) for e in exact])
    return [
        {
            "position": 1 + i * BAND,
            "same_top": float(s.float().mean()),
            "mean": float(d.abs().mean()),
            "p99": float(d.abs().quantile(0.99)),
        }
        for i, (s, d) in enumerate(zip(same.split(BAND, 1), difference.split(BAND, 1), strict=True))
    ]


def common_tokens(found: PromptLogprobs, answer: Sequence[int]) -> int:
    """Tokens of the exact cache's greedy answer before the first that another cache, which reads it, would not choose.

    There a greedy answer with that cache would differ first.
    """
    chosen = top_tokens(found)[-len(answer) :]
    return next((i for i, (x, y) in enumerate(zip(chosen, answer, strict=True)) if x != y), len(answer))


def measure(model: Transformer, caches: dict[str, torch.dtype], texts: Texts, answers: int) -> dict[str, Any]:
    length = len(texts[0]) - PROMPT
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    prompts = [list(text[:PROMPT]) for text in texts[:answers]]
    greedy = [c.tokens for c in Engine(model).generate(prompts, params)]
    both = [*texts, *(p + g for p, g in zip(prompts, greedy, strict=True))]
    exact = forced(model, None, texts)
    results: dict[str, Any] = {
        "nats_per_token": -statistics.mean(x for e in exact for x in e.logprobs[1:] if x is not None),
        "answer_tokens": length,
        "exact_bytes": Engine(model).block_bytes // BLOCK,
        "caches": {},
    }
    for name, dtype in caches.items():
        found = forced(model, dtype, both)
        results["caches"][name] = {
            "bytes": Engine(model, kv_cache_dtype=dtype).block_bytes // BLOCK,
            "forced": compare(found[: len(texts)], exact),
            "same_tokens": [common_tokens(f, g) for f, g in zip(found[len(texts) :], greedy, strict=True)],
        }
    return results


def main() -> None:
    args = arguments(__doc__)
    length, windows, answers = (64, 2, 2) if args.quick else (1000, 4, 2)
    steps, batch, trained = (3, 2, 64) if args.quick else (200, 4, 1024)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        import_model("smollm2", folder)
        tokens = load_tokenizer(folder)(text).input_ids
        model = load_model(folder, dtype=fastest_dtype()).eval()
        size = PROMPT + length
        figures["SmolLM2"] = measure(
            model, CACHES, [tokens[i * size : (i + 1) * size] for i in range(windows)], answers
        )
    data = text.encode()
    held_out = len(data) - windows * size
    model = train_latent(data[:held_out], steps, batch, trained)
    figures["latent"] = measure(
        model, {"fp8": CACHES["fp8"]}, [list(data[i : i + size]) for i in range(held_out, len(data), size)], answers
    )
    rows, bands, ratios = [], [], {}
    for work, found in figures.items():
        for name, cache in found["caches"].items():
            by_band = cache["forced"]
            same = statistics.mean(band["same_top"] for band in by_band)
            ratios[f"same-top-token/{work.lower()}-{name}"] = same
            rows.append([
                f"{work}, {name}", cache["bytes"], found["exact_bytes"], 100 * same,
                statistics.mean(band["mean"] for band in by_band), statistics.median(cache["same_tokens"]),
            ])  # fmt: skip
            bands += [[f"{work}, {name}", b["position"], 100 * b["same_top"], b["mean"], b["p99"]] for b in by_band]
    report(
        "kv_drift", args, ratios, figures,
        [
            (f"against a cache of {fastest()}", ["", "bytes a token", "exact", "same top token, %",
             "difference in log-probability", "greedy tokens the same, median"], rows),
            ("by position", ["", "from", "same top token, %", "difference, mean", "99th percentile"], bands),
        ],
        ["torch"],
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
