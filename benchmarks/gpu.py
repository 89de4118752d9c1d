"""Generation on a GPU: this engine and transformers, networks of SmolLM2's and of DeepSeek-V3's layout in BF16.

Weights are random, which changes no time. Tokens a second after prompts of 128, greedy, sampling included; and of a
prompt of 512.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from common import arguments, fastest, median, program, ratio_of_rounds, report
from rorqual.checkpoint.huggingface import save_model
from rorqual.errors import UserError
from rorqual.model import ModelConfig, Transformer
from sides import MIXTURE
from workers import Field

DENSE = ModelConfig(
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048,
    rope_interleave=False,
)  # fmt: skip
NETWORKS = {"llama-135m": DENSE, "deepseek-v3-300m": MIXTURE}
PROMPT = 128
US, PEER = "rorqual", "transformers"


def main() -> None:
    args = arguments(__doc__, turn=300, whole=1200, device="cuda")
    if not args.quick and args.device != "cuda":
        raise UserError(f"--device {args.device}: figures are of a GPU; add --quick to see that it runs")
    dtype = "bfloat16" if args.device == "cuda" else fastest()
    batches, count, rounds = ((1, 2), 4, 1) if args.quick else ((1, 32, 256), 64, 3)
    generator = torch.Generator().manual_seed(0)
    figures, ratios, rows = {}, {}, []
    with tempfile.TemporaryDirectory() as folder, Field(args.turn_limit, args.limit) as field:
        for name, config in NETWORKS.items():
            torch.manual_seed(0)
            save_model(Transformer(config).eval().to(getattr(torch, dtype)), Path(folder) / name)
            us, them = f"{US}, {name}", f"{PEER}, {name}"
            place = (Path(folder) / name, dtype, args.device)
            field.enter(us, "sides:OursWithoutWords", *place, {"kv_cache_bytes": 4 << 30}, ours=True)
            field.enter(them, "sides:Transformers", *place)
            works: dict[str, tuple[str, Any]] = {}
            for batch in batches:
                prompts = torch.randint(3, config.vocab_size, (batch, PROMPT), generator=generator).tolist()
                works[f"{name}-b{batch}"] = ("decode", (prompts, count))
            long = torch.randint(3, config.vocab_size, (512,), generator=generator).tolist()
            works[f"{name}-prefill-512"] = ("prefill", (long,))
            for work, (method, what) in works.items():
                field.turns((us, them), method, what, 1)  # warm
                found = field.turns((us, them), method, what, rounds)
                if method == "prefill":
                    found = {side: [len(long) / seconds for seconds in values] for side, values in found.items()}
                figures[work] = {side.partition(",")[0]: values for side, values in found.items()}
                if len(found) == 2:
                    ratios[f"gpu-{work}/transformers"] = ratio_of_rounds(found[us], found[them])["median"]
                rows.append([work, median(found, us), median(found, them)])
            for side in (us, them):
                field.leave(side)
    report(
        "gpu", args, ratios, {"tokens_per_second": figures},
        [(f"tokens/s in {dtype}", ["", US, PEER], rows)], ["torch", "transformers"], field.failed, field.ours,
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
