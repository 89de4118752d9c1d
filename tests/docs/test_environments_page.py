"""Every snippet of docs/environments.md runs, as a new user would: written to files, trained with for two steps."""

import json
import math
import re
import tomllib
from importlib.util import find_spec

import pytest
import torch

from helpers.pages import ROOT, blocks
from rorqual.checkpoint.huggingface import save_model
from rorqual.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from rorqual.engine import Engine
from rorqual.errors import UserError
from rorqual.evals.evaluate import evaluate
from rorqual.evals.tasks import split_tasks
from rorqual.model import ModelConfig, Transformer
from rorqual.recipe import DistillRecipe, RLRecipe, TokenizerSection, load_recipe
from rorqual.rl.distillation import distill
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.rl_run import rl
from rorqual.rl.shown_prompts import worked_sample
from rorqual.rl_sections import EnvironmentSection

PAGE = ROOT / "docs" / "environments.md"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHORT = ["steps=2", "grpo.group_size=2", "grpo.questions_per_step=2", "grpo.kl=0", "eval_every=0"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the page's files, and a tiny model of random weights in models/smollm2."""
    monkeypatch.chdir(tmp_path)
    for language, text in blocks(PAGE):
        if name := re.match(r"# (\S+\.(?:py|toml))\n", text):
            (tmp_path / name[1]).write_text(text)
        elif language == "json":
            (tmp_path / "programs.jsonl").write_text(text * 20)
    section = TokenizerSection(vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"], whole_numbers=20)
    tokenizer = train_tokenizer(["Guess my number between 1 and 100."], section)
    tokenizer.chat_template = CHATML
    config = ModelConfig(
        model_type="llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=2048,
        initializer_range=0.1, eos_token_id=[tokenizer.eos_token_id, tokenizer.get_vocab()["<|im_end|>"]],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config)
    model.head_weight.data[tokenizer.get_vocab()["<|im_end|>"]] *= 6  # it ends turns
    save_model(model, tmp_path / "models" / "smollm2", tokenizer)
    save_tokenizer(tokenizer, tmp_path / "models" / "smollm2")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "logged"),
    [
        ("sums", "reward_accuracy"),
        ("treasure", "turns"),
        ("concise", "reward_concise"),
        ("programs", "reward_accuracy"),
    ],
)
def test_every_recipe_trains(folder, name, logged):
    tokens = 120 if name == "treasure" else 12
    checked = load_recipe(folder / f"{name}.toml", RLRecipe, [*SHORT, f"grpo.max_tokens={tokens}"])
    rl(checked)
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["reward"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert logged in lines[-1]
    if name == "treasure":
        assert max(line["turns"] for line in lines) > 1


def test_worked_solutions_are_learnt_and_shown_as_on_the_page(folder):
    recipe = load_recipe(folder / "shop.toml", DistillRecipe, ["problems=6", "train.batch_size=2"])
    (shown,) = [text for language, text in blocks(PAGE) if language == "text"]
    # The page's is of SmolLM2, whose template differs in nothing that is in this conversation.
    made = worked_sample(recipe, load_tokenizer(folder / "models" / "smollm2")).splitlines()[1:]
    assert "\n".join(line.removeprefix("    ") for line in made) == shown.strip()
    run_dir = distill(recipe)
    assert len((run_dir / "samples.jsonl").read_text().splitlines()) == 6
    assert (run_dir / "student" / "model" / "config.json").exists()


def test_the_first_has_15_lines(folder):
    written = (folder / "sums.py").read_text().strip().splitlines()
    assert len(written) <= 15


def test_eval_takes_the_recipe_and_the_class(folder):
    engine = Engine(folder / "models" / "smollm2")
    for task in ("treasure.toml", "sums.py:Sums"):
        found = evaluate(engine, split_tasks(task), samples=2, problems=3, max_tokens=100, quiet=True)
        (result,) = found.tasks.values()
        assert result.problems == 3
        assert 0 <= result.pass_at_1 <= 1


@pytest.mark.parametrize(("number", "package"), [(0, "textarena"), (1, "verifiers")])
def test_sections_without_a_file(number, package):
    """What they name loads, or the extra that brings it is named."""
    texts = [text for language, text in blocks(PAGE) if language == "toml" and not text.startswith("# ")]
    assert len(texts) == 2
    (section,) = tomllib.loads(texts[number])["environments"]
    if find_spec(package) is None:
        with pytest.raises(UserError, match=rf"package {package} is missing; run: pip install 'rorqual\[envs\]'"):
            open_environment(EnvironmentSection(**section))
    elif package == "textarena":
        assert "number" in open_environment(EnvironmentSection(**section)).problems("train", 1)[0].question
