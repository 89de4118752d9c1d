"""Speculative decoding of one sequence: how many guesses are right, and what that is worth in time.

The speedrun's own model guesses by its multi-token module and by look-up, on its development problems, sampled at
temperature 1; SmolLM2, which has no module, by look-up, where it copies from its prompt and where it does not. Answers
with guesses and without are compared token by token.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import arguments, fastest_dtype, program, ratio_of_rounds, report
from rorqual.checkpoint.gguf_import import import_model
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.prompts import prompt_text
from rorqual.speedrun.level import LEVELS

TEXT = (
    "The rorquals are the largest group of baleen whales, with ten species in three genera. They include the blue "
    "whale, which can reach 180 tonnes, and the fin whale, which reaches 120 tonnes; even the smallest of the group, "
    "the northern minke whale, reaches nine tonnes."
)
QUESTIONS = {
    "SmolLM2 copies": f"Repeat this text word for word:\n\n{TEXT}",
    "SmolLM2 explains": "Explain in three sentences why the sky is blue.",
}


def one_by_one(engine: Engine, prompts: list[str], params: SamplingParams) -> tuple[float, list[list[int]]]:
    """Tokens a second, and the tokens."""
    start = time.perf_counter()
    found = [engine.generate([p], params)[0].tokens for p in prompts]
    return sum(map(len, found)) / (time.perf_counter() - start), found


def compare(
    work: str, plain: Engine, guessing: dict[str, Engine], prompts: list[str], params: SamplingParams, rounds: int
) -> tuple[list[list[Any]], dict[str, float]]:
    engines = {"": plain} | guessing
    for engine in engines.values():
        one_by_one(engine, prompts[:1], params)
    before = {name: vars(engine.status().counters).copy() for name, engine in engines.items()}
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    rows, ratios, same = [], {}, {}
    for i in range(rounds):
        said = {}
        for name, engine in sorted(engines.items(), reverse=bool(i % 2)):
            speed, said[name] = one_by_one(engine, prompts, params)
            speeds[name].append(speed)
        same = {name: sum(a == b for a, b in zip(said[name], said[""], strict=True)) / len(prompts) for name in said}
    for name, engine in guessing.items():
        counts = engine.status().counters
        drafted, accepted, made = (
            getattr(counts, k) - before[name][k] for k in ("draft_tokens", "accepted_tokens", "generated_tokens")
        )
        ratio = ratio_of_rounds(speeds[name], speeds[""])["median"]
        ratios[f"{name}-{work.replace(' ', '-').lower()}/without"] = ratio
        without, with_it = (sorted(speeds[n])[rounds // 2] for n in ("", name))
        right, a_pass = 100 * accepted / max(1, drafted), made / (made - accepted)
        rows.append([f"{work}, {name}", right, a_pass, without, with_it, ratio, 100 * same[name]])
    return rows, ratios


def main() -> None:
    args = arguments(__doc__, run="runs/speedrun")
    rounds, problems = (1, 2) if args.quick else (5, 20)
    times, length = (1, 32) if args.quick else (8, 96)
    rows, ratios = [], {}
    run = Path(args.run)
    if not (run / "model").exists():
        raise UserError(f"--run {run}: no model there; run `rorqual speedrun` first, or name the folder of a run")
    name = json.loads((run / "summary.json").read_text())["level"]
    level = next(level for level in LEVELS if level.name == name)
    environments = [open_environment(section) for section in level.environments]
    for stage, folder in (("after pre-training", run / "pretrain" / "model"), ("at the end", run / "model")):
        load: dict[str, Any] = {"dtype": fastest_dtype(), "weights": "int8", "kv_cache_bytes": 1 << 26}
        plain = Engine(folder, **load)
        guessing = {way: Engine(folder, speculative=way, **load) for way in ("mtp", "ngram")}
        questions = [p.question for e in environments for p in e.problems("dev", problems, 0)]
        prompts = [prompt_text(q, "plain", plain.require_tokenizer()) for q in questions]
        params = SamplingParams(max_tokens=level.max_tokens, seed=0)
        more, found = compare(f"speedrun {stage}", plain, guessing, prompts, params, rounds)
        rows += more
        ratios |= found
    with tempfile.TemporaryDirectory() as folder:
        import_model("smollm2", folder)
        load = {"dtype": fastest_dtype(), "weights": "int4", "kv_cache_bytes": 1 << 26}
        plain, guessing = Engine(folder, **load), {"ngram": Engine(folder, speculative="ngram", **load)}
        for work, question in QUESTIONS.items():
            prompt = plain.require_tokenizer().apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            more, found = compare(
                work, plain, guessing, [prompt] * times, SamplingParams(temperature=0, max_tokens=length), rounds
            )
            rows += more
            ratios |= found
    columns = ["", "guesses right, %", "tokens a pass", "tokens/s without", "with", "ratio", "same answers, %"]
    title = f"one sequence, {torch.get_num_threads()} threads"
    report("speculate", args, ratios, {"columns": columns, "rows": rows}, [(title, columns, rows)], ["torch"])


if __name__ == "__main__":
    program(main)
