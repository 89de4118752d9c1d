"""Every command line of the documentation is run here on tiny models, or is named with what runs it instead."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib

import pytest
import torch

from helpers.gguf_files import network, write
from helpers.pages import PAGES, ROOT, blocks, shell_lines
from rorqual.checkpoint.huggingface import save_model
from rorqual.data.tokenizer import load_tokenizer, save_tokenizer
from rorqual.model import ModelConfig, Transformer
from rorqual.recipe import RLRecipe, load_recipe

# The beginning of a command, and why it is not run here.
NOT_RUN = {
    "git clone": "there is no repository to clone from; .ci/run begins with a checkout",
    "make ": ".ci/run does: an environment from nothing takes minutes and downloads",
    "python src/rorqual/kernels/cpu/build.py": "make does, in .ci/run; tests/kernels/test_build.py with a script",
    "pip install --editable": "make does, in .ci/run",
    "pip install 'rorqual[cluster]'": "tests/rl/test_ray_cluster.py and tests/serve/test_replicas.py need it",
    "pip wheel": ".ci/wheel.sh does",
    "rorqual import smollm2": "test_commands.py, with what it prints; here models/smollm2 is a tiny model",
    "rorqual pretrain recipes/cluster-in-a-box.toml": "trains on the pages; tests/train/test_processes.py with less",
    "rorqual pretrain RECIPE.toml --processes": "tests/train/test_processes.py",
    "rorqual rl RECIPE.toml --ray": "tests/rl/test_ray_cluster.py",
    "rorqual serve models/deepseek-v2-lite": "needs that model; tests/engine/test_expert_parallel.py",
    "rorqual eval deepseek-ai/": "needs R1's weights and the Hub; tests/evals with less",
    "rorqual r1 recipes/r1-smollm2.toml": "takes hours; tests/pipeline/test_run.py with small recipes",
    "rorqual distill my-distill.toml": "needs a teacher that answers correctly; tests/rl/test_rejection_sampling.py",
}
SHORT_EVAL = "--problems 2 --samples 1 --max-tokens 8"
SHORT_RL = "eval_every=0 grpo.group_size=2 grpo.questions_per_step=2 grpo.max_tokens=8"
# The beginning of a command, and what is added so that it takes seconds: the last of two equal options counts.
RUN = {
    "rorqual speedrun": "--minutes 0.5",
    "rorqual pretrain recipes/pretrain-tiny.toml": "tokenizer.vocab_size=300 data.sequence_length=32 train.seconds=3 "
    "train.batch_ramp=[2,0.1]",
    "rorqual pretrain recipes/v3-671b.toml --dry-run": "",
    "rorqual sft": "train.epochs=1 data.sequence_length=64",
    "rorqual rl recipes/r1-zero-smollm2.toml": f"seconds=3 {SHORT_RL}",
    "rorqual rl my-rl.toml": f"steps=1 {SHORT_RL}",
    "rorqual reward my-reward.toml": "train.batch_size=2",
    "rorqual eval MODEL": SHORT_EVAL,
    "rorqual eval runs/": SHORT_EVAL,
    "rorqual generate": "--max-tokens 8",
    "rorqual chat": "--max-tokens 8",
    "rorqual report": "",
    "rorqual quantize": "--samples 4 --sequence-length 64",
    "rorqual import model.gguf": "",
    "rorqual serve models/smollm2": "",
    "rorqual serve runs/": "",
    "rorqual plan": "",
    "rorqual ledger": "",
    "curl": "",
}
# A command comes after those that make what it reads.
ORDER = [
    "speedrun",
    "quantize",
    "import",
    "plan",
    "pretrain",
    "sft",
    "reward",
    "rl",
    "ledger",
    "eval",
    "report",
    "generate",
    "chat",
    "serve",
]
NAMES = {"MODEL": "models/smollm2", "runs/NAME": "runs/mine"}


def commands():
    """All command lines of the pages, once each, without what follows a pipe, a # or an &."""
    found = {}
    for page in PAGES:
        if page.name != "CHANGELOG.md":
            for line in shell_lines(page):
                words = shlex.split(line, comments=True)
                stop = [i for i, word in enumerate(words) if word in ("|", "&", "&&")]
                found[shlex.join(words[: stop[0]] if stop else words)] = page.name
    return list(found)


def entry(table, command):
    return next((table[key] for key in table if command.startswith(key)), None)


def test_every_command_is_run_or_excused():
    for command in commands():
        assert (entry(NOT_RUN, command) is None) != (entry(RUN, command) is None), command
    for key in (*RUN, *NOT_RUN):
        assert any(command.startswith(key) for command in commands()), f"no page has {key}"


def rorqual(words, folder, **options):
    program = "import sys; from rorqual.cli.entry import main; main()"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", program, *words], cwd=folder, env=environment, text=True, **options)


def prepare(folder):
    """What the pages take for granted: texts, conversations, problems, a recipe, a GGUF file."""
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "books").mkdir()
    (folder / "books" / "one.txt").write_text("\n".join(f"{i} and {i + 1} make {2 * i + 1}." for i in range(3000)))
    talk = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    (folder / "talks.jsonl").write_text((json.dumps(talk) + "\n") * 8)
    problems = [json.dumps({"question": f"What is {n} + {n + 1}?", "answer": str(2 * n + 1)}) for n in range(100)]
    for name in ("problems.jsonl", "aime.jsonl"):
        (folder / name).write_text("\n".join(problems) + "\n")
    pair = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5, or so"}
    (folder / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 4)
    toml = [
        text for page in ("rl.md", "r1.md") for language, text in blocks(ROOT / "docs" / page) if language == "toml"
    ]
    for kind in ("rl", "reward"):
        (folder / f"my-{kind}.toml").write_text(next(text for text in toml if tomllib.loads(text).get("kind") == kind))
    write(folder / "model.gguf", network())


def make_smollm2(folder):
    """A grouped-query model with the speedrun's tokenizer, which is there by then."""
    tokenizer = load_tokenizer(folder / "runs" / "speedrun" / "model")
    torch.manual_seed(0)
    config = ModelConfig(
        model_type="llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, rope_interleave=False, max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save_model(Transformer(config), folder / "models" / "smollm2", tokenizer)
    save_tokenizer(tokenizer, folder / "models" / "smollm2")


def run(command, folder):
    words = [NAMES.get(word, word) for word in shlex.split(command)[1:] + shlex.split(entry(RUN, command))]
    process = rorqual(words, folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, error = process.communicate("hello\n" if words[0] == "chat" else "")
    assert process.returncode == 0, f"rorqual {shlex.join(words)}\n{error[-2000:]}"
    assert out.strip() or words[0] in ("generate", "chat"), command


def serve(command, requests, folder):
    """It starts, answers the pages' requests, and ends in order on SIGTERM."""
    with (folder / "log").open("w") as log:
        process = rorqual([*shlex.split(command)[1:], "--port", "0"], folder, stdout=log, stderr=log)
    try:
        while not (address := re.search(r"http://[\d.]+(:\d+)/v1", said := (folder / "log").read_text())):
            assert process.poll() is None, said
            time.sleep(0.2)
        for request in requests if shutil.which("curl") else ():
            words = shlex.split(request.replace(":8000", address[1]))
            done = subprocess.run(words, capture_output=True, text=True, timeout=120)
            assert json.loads(done.stdout)["choices"][0]["finish_reason"], done
    finally:
        process.terminate()
    assert process.wait(60) == 0


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    prepare(tmp_path)
    chosen = [c for c in commands() if entry(RUN, c) is not None]
    requests = [c for c in chosen if c.startswith("curl")]
    for command in sorted((c for c in chosen if c not in requests), key=lambda c: ORDER.index(c.split()[1])):
        if command.startswith("rorqual serve"):
            serve(command, requests, tmp_path)
        else:
            run(command, tmp_path)
            if command.startswith("rorqual speedrun"):
                make_smollm2(tmp_path)
    for recipe in ("my-rl.toml", "recipes/r1-zero-smollm2.toml"):
        assert (tmp_path / "runs" / load_recipe(tmp_path / recipe, RLRecipe).name / "model" / "config.json").exists()
