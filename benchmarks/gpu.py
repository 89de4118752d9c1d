"""Generation on a GPU: this engine and transformers, networks of SmolLM2's and of DeepSeek-V3's layout in BF16.

Weights are random, which changes no time. Tokens a second after prompts of 128, greedy, sampling included; and of a
prompt of 512.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import arguments, program, ratio_of_rounds, report, take_turns
from rorqual.engine import Engine
from rorqual.errors import UserError
from rorqual.model import ModelConfig, Transformer
from rorqual.model.checkpoint import save_model
from sides import MIXTURE, Ours, Transformers

DENSE = ModelConfig(
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048,
    rope_interleave=False,
)  # fmt: skip
NETWORKS = {"llama-135m": DENSE, "deepseek-v3-300m": MIXTURE}
PROMPT = 128


def main() -> None:
    args = arguments(__doc__.splitlines()[0], device="cuda")
    if not args.quick and args.device != "cuda":
        raise UserError(f"--device {args.device}: figures are of a GPU; add --quick to see that it runs")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU here; say --device cpu --quick to see that it runs")
    batches, count, rounds = ((1, 2), 4, 1) if args.quick else ((1, 32, 256), 64, 3)
    generator = torch.Generator().manual_seed(0)
    figures, ratios, rows = {}, {}, []
    for name, config in NETWORKS.items():
        torch.manual_seed(0)
        model = Transformer(config).eval().bfloat16()
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, Path(folder) / "model")
            theirs = Transformers(Path(folder) / "model", args.device)
        ours = Ours(Engine(model.to(args.device), cache_bytes=4 << 30))
        works: dict[str, Callable[[Any], float]] = {}
        for batch in batches:
            prompts = torch.randint(3, config.vocab_size, (batch, PROMPT), generator=generator).tolist()
            works[f"{name}-b{batch}"] = lambda side, p=prompts: side.decode(p, count)
        long = torch.randint(3, config.vocab_size, (512,), generator=generator).tolist()
        works[f"{name}-prefill-512"] = lambda side, p=long: len(p) / side.prefill(p)
        for work, run in works.items():
            turns = {"rorqual": lambda f=run, s=ours: f(s), "transformers": lambda f=run, s=theirs: f(s)}
            take_turns(turns, 1)  # warm
            figures[work] = found = take_turns(turns, rounds)
            ratios[f"gpu-{work}/transformers"] = ratio_of_rounds(*found.values())["median"]
            rows.append([work, *(sorted(values)[rounds // 2] for values in found.values())])
        del ours, theirs, model, turns
    report(
        "gpu", args, ratios, {"tokens_per_second": figures},
        [("tokens/s in BF16", ["", "rorqual", "transformers"], rows)], ["torch", "transformers"],
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
