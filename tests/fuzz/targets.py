"""Every verb with every file it reads: small valid seeds, and what of them a trial damages."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from helpers.corruption import damaged, odd
from helpers.gguf_files import KINDS, LLAMA, network, write
from helpers.reasoning_model import save_reasoner
from rorqual.train.run_folder import to_toml

SIZES = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "initializer_range": 0.1, "max_position_embeddings": 128, "rope_interleave": False,
}  # fmt: skip
TRAIN = {"steps": 2, "batch_size": 2, "threads": 1}
SUMS = {
    "name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}  # fmt: skip
GRPO = {"group_size": 2, "questions_per_step": 2, "max_tokens": 4, "kl": 0.01}
MINE = {"name": "mine", "path": "problems.jsonl"}
# Fields that say how long a run takes: a large value there is no fault.
LENGTHS = ("steps", "seconds", "epochs", "batch_size", "problems", "samples", "group_size", "questions_per_step",
           "max_tokens", "batch_ramp", "eval_problems", "vocab_size", "sequence_length")  # fmt: skip


def pretrain_recipe(source="corpus.txt"):
    return {
        "name": "run", "out": "runs", "model": {"config": SIZES}, "tokenizer": {"vocab_size": 270},
        "data": {"sources": [{"path": source}], "sequence_length": 16, "workers": 1, "valid_fraction": 0.1},
        "train": TRAIN,
    }  # fmt: skip


RECIPES = {
    "pretrain": pretrain_recipe(),
    "sft": {
        "name": "run", "out": "runs", "model": {"path": "student"}, "data": {"path": "chats.jsonl"}, "train": TRAIN,
    },
    "rl": {
        "name": "run", "out": "runs", "model": {"path": "model"}, "environments": [SUMS, MINE], "grpo": GRPO,
        "steps": 1,
    },
    "distill": {
        "name": "run", "out": "runs", "teacher": "model", "model": {"path": "model"}, "environments": [MINE],
        "problems": 2, "samples": 2, "max_tokens": 4, "train": TRAIN, "template": "plain",
    },
}  # fmt: skip
PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATS = [
    {"messages": [{"role": "user", "content": f"what is {n} and 7?"}, {"role": "assistant", "content": str(n + 7)}]}
    if n % 2
    else {"prompt": f"what is {n} and 12?", "completion": str(n + 12)}
    for n in range(12)
]  # fmt: skip
PROBLEMS = [{"question": f"what is {n} and {n}?", "answer": str(2 * n)} for n in range(40)]
TEXTS = [{"text": f"what is {n} and {n + 1}? it is {2 * n + 1}. " * 4} for n in range(60)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def make_seeds(folder):
    """Write everything that trials damage."""
    folder.mkdir(parents=True)
    save_reasoner(folder / "model")
    shutil.copytree(folder / "model", folder / "student")
    (folder / "student" / "chat_template.jinja").write_text(PLAIN)
    write(folder / "model.gguf", network(LLAMA), KINDS.Q8_0)
    (folder / "corpus.txt").write_text("\n".join(row["text"] for row in TEXTS))
    (folder / "corpus.jsonl").write_bytes(lines(TEXTS))
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))
    (folder / "problems.jsonl").write_bytes(lines(PROBLEMS))
    (folder / "chats.jsonl").write_bytes(lines(CHATS))
    (folder / "chats.jsonl.gz").write_bytes(gzip.compress(lines(CHATS)))
    chats = [{"prompt": f"what is {n}?", "completion": str(n)} for n in range(12)]
    for name, rows in (("corpus", TEXTS), ("problems", PROBLEMS), ("chats", chats)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")
    (folder / "keys.txt").write_text("# keys\nsecret-one\nsecret-two\n")
    for verb, recipe in RECIPES.items():
        (folder / f"{verb}.toml").write_text(to_toml(recipe))
    _finished_run(folder)


def _finished_run(folder):
    """A run that was stopped, so that --resume and report have what they read."""
    recipe = pretrain_recipe() | {"name": "done"}
    recipe["train"] = TRAIN | {"save_every": 1, "keep": 9}
    (folder / "done.toml").write_text(to_toml(recipe))
    code = "import sys; sys.argv = sys.argv[:1] + ['pretrain', 'done.toml']; from rorqual.cli.entry import main; main()"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                   capture_output=True)  # fmt: skip


@dataclass
class Target:
    """A command; `prepare` damages its file (rng None: leaves it whole) and gives words and standard input.

    writes: where the command may change what was there; status: of the command with undamaged files.
    """

    prepare: Callable[[Path, random.Random | None], tuple[list[str], bytes]]
    writes: tuple[str, ...] = ()
    status: int = 0


def hurt_bytes(path, rng):
    data = path.read_bytes()
    path.write_bytes(damaged(rng, data, max(1, len(data))))


def hurt_json(path, rng):
    try:
        value = json.loads(path.read_bytes())
    except ValueError:  # weights, a template
        value = None
    if value is None or rng.random() < 0.3:
        hurt_bytes(path, rng)
    else:
        path.write_text(json.dumps(odd(rng, value)))


def hurt_lines(path, rng):
    """JSONL, also gzipped: a line with odd values, or damaged bytes inside or outside the compression."""
    packed = path.suffix == ".gz"
    if packed and rng.random() < 0.4:
        return hurt_bytes(path, rng)
    data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    if rng.random() < 0.4:
        data = damaged(rng, data, len(data))
    else:
        rows = data.splitlines()
        at = rng.randrange(len(rows))
        rows[at] = json.dumps(odd(rng, json.loads(rows[at]))).encode()
        data = b"\n".join(rows)
    path.write_bytes(gzip.compress(data) if packed else data)


def hurt_parquet(path, rng):
    """Damaged bytes, or a table with other columns: nulls, numbers, lists, half characters, nothing."""
    if rng.random() < 0.6:
        return hurt_bytes(path, rng)
    rows = pyarrow.parquet.read_table(path).to_pylist()
    column = rng.choice(list(rows[0]))
    values = rng.choice([None, 3, 0.5, [1], ["x"], {"a": 1}, b"\xff\xfe", True, ""])
    for row in rows if rng.random() < 0.5 else rows[3:4]:
        if values is None or isinstance(values, str) or row is rows[0] or len(rows) > 1:
            row[column] = values
    try:
        table = pyarrow.Table.from_pylist(rows)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):  # a column of several types
        table = pyarrow.Table.from_pylist([row | {column: values} for row in rows])
    pyarrow.parquet.write_table(rng.choice([table, table.drop_columns([column]), table.slice(0, 0)]), path)


def hurt_toml(path, rng):
    if rng.random() < 0.3:
        return hurt_bytes(path, rng)
    recipe = tomllib.loads(path.read_text())
    changed = odd(rng, recipe)
    path.write_text(to_toml(_bounded(changed, recipe)))


def _bounded(changed, whole):
    """Large numbers that only make a run long are taken back."""
    if not isinstance(changed, dict) or not isinstance(whole, dict):
        return changed
    out = {}
    for key, value in changed.items():
        large = isinstance(value, int | float) and not isinstance(value, bool) and value > 100
        out[key] = whole.get(key, 2) if key in LENGTHS and large else _bounded(value, whole.get(key))
    return out


def on(file, hurt, *words, writes=(), stdin=b"", status=0):
    """A target that damages one file of the folder."""

    def prepare(folder, rng):
        if rng is not None:
            paths = sorted(folder.glob(file))
            hurt(rng.choice(paths), rng)
        return list(words), stdin

    return Target(prepare, writes, status)


VALUES = ["nan", "inf", "-inf", "-1", "0", "1e400", "1e-400", "99999999999999999999", "", "x", "0x1", "½", "true",
          "1_0", " 1", "1.5", "\udcff"]  # fmt: skip
OPTIONS = {
    "generate": ["--temperature", "--top-p", "--max-tokens", "--thinking-budget", "--seed", "--weights", "--dtype",
                 "--speculative", "--device"],
    "eval": ["--samples", "--problems", "--template", "--temperature", "--top-p", "--max-tokens", "--thinking-budget",
             "--seed", "--against", "--dtype", "--device", "--tasks"],
    "serve": ["--host", "--port", "--name", "--api-keys", "--max-num-seqs", "--cache-gb", "--max-queue", "--timeout",
              "--dtype",
              "--weights", "--kv-cache-dtype", "--speculative", "--device"],
    "quantize": ["--format"],
    "speedrun": ["--seed", "--minutes", "--out"],
}  # fmt: skip
BASE = {
    "generate": ["generate", "model", "what is 1 and 2?", "--max-tokens", "4", "--json"],
    "eval": ["eval", "model", "--tasks", "problems.jsonl", "--problems", "2", "--samples", "1", "--max-tokens", "4",
             "--json"],
    "serve": ["serve", "model", "--port", "0", "--no-page"],
    "quantize": ["quantize", "model", "packed"],
    "speedrun": ["speedrun", "--minutes", "0.1", "--out", "none"],
}  # fmt: skip


def options_of(verb):
    """A target that gives a verb's options odd values."""

    def prepare(folder, rng):
        words = list(BASE[verb])
        if verb == "serve":
            _do_not_listen()
        if rng is not None:
            for _ in range(rng.choice([1, 1, 2])):
                option = rng.choice(OPTIONS[verb])
                large = option in ("--max-tokens", "--samples", "--minutes", "--max-num-seqs", "--cache-gb")
                values = [v for v in VALUES if not (large and v.startswith("9"))]
                if option == "--minutes":  # and what is a time would be taken
                    values = [v for v in values if v not in ("1.5", " 1", "1_0")]
                words += [option, rng.choice(values)]
        elif verb == "speedrun":
            words = ["doctor"]
        return words, b""

    return Target(prepare, ("packed", "runs", "none"))


def _do_not_listen():
    """Serving ends where it would begin to wait for clients."""
    import rorqual.serve.server

    rorqual.serve.server.serve = lambda *_: None


def overrides(verb):
    """A target that overrides fields of a recipe on the command line."""

    def prepare(folder, rng):
        words = [verb, f"{verb}.toml"]
        if rng is not None:
            recipe = RECIPES[verb]
            fields = [f"{a}.{b}" for a, s in recipe.items() if isinstance(s, dict) for b in s] + list(recipe)
            field = rng.choice([*fields, "x", "model", "", "a.b.c", "train.nothing", "environments.0.weight"])
            if field.rpartition(".")[2] in LENGTHS:
                values = ["nan", "-1", "0", "", "x", "1.5", "true", "[1]", "{}"]
            else:
                values = [*VALUES, "[]", "{}", "[1, 2]", '"x"', "..", "/", "~", "$HOME"]
            words.append(rng.choice([f"{field}={rng.choice(values)}", field]))
        return words, b""

    return Target(prepare, ("runs/",))


SAID = "what is 1 and 2? <think> é 🐋\n/help\n\n".encode()


def heard(*words):
    """A target that reads odd words from standard input."""

    def prepare(folder, rng):
        return list(words), SAID if rng is None else damaged(rng, SAID * rng.choice([1, 1, 40]), len(SAID))

    return Target(prepare)


def resumed(file, hurt):
    """A target that goes on with a run, a file of which is damaged."""
    return on(file, hurt, "pretrain", "done.toml", "--resume", writes=("runs/done/",))


ASK = ("generate", "model", "what is 1 and 2?", "--max-tokens", "4", "--json")
TRIED = ("--problems", "2", "--samples", "1", "--max-tokens", "4", "--json")
EVAL = ("eval", "model", "--tasks", "problems.jsonl", *TRIED)
RUNS = {"writes": ("runs/",)}
TARGETS = {
    **{f"{verb}-recipe": on(f"{verb}.toml", hurt_toml, verb, f"{verb}.toml", **RUNS) for verb in RECIPES},
    **{f"{verb}-overrides": overrides(verb) for verb in RECIPES},
    **{f"{verb}-options": options_of(verb) for verb in BASE},
    **{f"dry-{verb}": on(f"{verb}.toml", hurt_toml, verb, f"{verb}.toml", "--dry-run", **RUNS)
       for verb in ("pretrain", "sft", "rl")},
    **{f"pretrain-{name}": on(f"corpus.{name}", hurt, "pretrain", "pretrain.toml",
                              f'data.sources=[{{path = "corpus.{name}"}}]', **RUNS)
       for name, hurt in (("txt", hurt_bytes), ("jsonl", hurt_lines), ("jsonl.gz", hurt_lines),
                          ("parquet", hurt_parquet))},
    **{f"sft-{name}": on(f"chats.{name}", hurt, "sft", "sft.toml", f'data.path="chats.{name}"', **RUNS)
       for name, hurt in (("jsonl", hurt_lines), ("jsonl.gz", hurt_lines), ("parquet", hurt_parquet))},
    "rl-problems": on("problems.jsonl", hurt_lines, "rl", "rl.toml", **RUNS),
    "distill-problems": on("problems.jsonl", hurt_lines, "distill", "distill.toml", **RUNS),
    "eval-problems": on("problems.jsonl", hurt_lines, *EVAL),
    "eval-parquet": on("problems.parquet", hurt_parquet, "eval", "model", "--tasks", "problems.parquet", *TRIED),
    "eval-recipe": on("rl.toml", hurt_toml, "eval", "model", "--tasks", "rl.toml", *TRIED),
    "generate-settings": on("model/*.json", hurt_json, *ASK),
    "generate-weights": on("model/*.safetensors", hurt_bytes, *ASK),
    "generate-gguf": on("model.gguf", hurt_bytes, "generate", "model.gguf", "hi", "--max-tokens", "4", "--json"),
    "generate-template": on("model/chat_template.jinja", hurt_bytes, *ASK),
    "generate-words": heard("generate", "model", "-", *ASK[3:]),
    "generate-raw": heard("generate", "model", "-", "--raw", *ASK[3:]),
    "chat-words": heard("chat", "model", "--max-tokens", "4"),
    "eval-against": on("student/*", hurt_json, *EVAL, "--against", "student"),
    "distill-teacher": on("model/*", hurt_json, "distill", "distill.toml", **RUNS),
    "sft-model": on("student/*.json", hurt_json, "sft", "sft.toml", **RUNS),
    "rl-model": on("model/*.json", hurt_json, "rl", "rl.toml", **RUNS),
    "eval-model": on("model/*.json", hurt_json, *EVAL),
    "serve-model": on("model/*.json", hurt_json, *BASE["serve"]),
    "serve-keys": on("keys.txt", hurt_bytes, *BASE["serve"], "--api-keys", "keys.txt"),
    "import-gguf": on("model.gguf", hurt_bytes, "import", "model.gguf", "imported", writes=("imported",)),
    "import-model": on("model/*", hurt_json, "import", "model", "imported", writes=("imported",)),
    "quantize-model": on("model/*.json", hurt_json, "quantize", "model", "packed", writes=("packed",)),
    "report-json": on("runs/done/ledger.json", hurt_json, "report", "runs/done", writes=("runs/done/",)),
    "report-metrics": on("runs/done/metrics.jsonl", hurt_lines, "report", "runs/done", writes=("runs/done/",)),
    "resume-state": resumed("runs/done/checkpoints/step-*/state.json", hurt_json),
    "resume-tensors": resumed("runs/done/checkpoints/step-*/tensors.safetensors", hurt_bytes),
    "resume-metrics": resumed("runs/done/metrics.jsonl", hurt_lines),
    "resume-recipe": resumed("runs/done/recipe.toml", hurt_toml),
    "resume-tokenizer": resumed("runs/done/tokenizer/*.json", hurt_json),
    "resume-data": resumed("runs/done/data/*/*", hurt_bytes),
}  # fmt: skip
for name in ("distill-recipe", "distill-overrides", "distill-problems", "distill-teacher"):
    TARGETS[name].status = 2  # a teacher of random weights gets nothing right
for name in ("serve-model", "serve-keys"):
    prepare = TARGETS[name].prepare
    TARGETS[name].prepare = lambda folder, rng, prepare=prepare: (_do_not_listen(), prepare(folder, rng))[1]
