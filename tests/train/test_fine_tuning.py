import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers.training import stopped_after
from rorqual.adapters.lora import merge
from rorqual.adapters.peft_files import read_adapter
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from rorqual.engine import Engine
from rorqual.errors import UserError
from rorqual.plan.estimate import plan_text
from rorqual.recipe import LoRASection, PretrainRecipe, SFTRecipe, TokenizerSection, load_recipe, parse_recipe
from rorqual.train.build_model import tokenizer_of
from rorqual.train.dry_run import dry_run, recipe_config
from rorqual.train.training_run import _forecast, pretrain, sft


@pytest.fixture
def chat_recipe(tmp_path, make_model):
    """A base model with its tokenizer, and a recipe that teaches it to answer 'no' to 'yes' and the other way."""
    lines = [{"prompt": f"say {a}", "completion": b} for a, b in (("yes", "no"), ("no", "yes"))] * 40
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    tokenizer = train_tokenizer(["say yes no"], TokenizerSection(vocab_size=262))
    model = make_model()
    model = type(model)(model.config.replace(vocab_size=262, eos_token_id=tokenizer.eos_token_id))
    save_model(model, tmp_path / "base", tokenizer)

    def make(**train):
        raw = {
            "name": "sft",
            "out": str(tmp_path / "runs"),
            "model": {"path": str(tmp_path / "base")},
            "data": {"path": str(tmp_path / "chat.jsonl"), "sequence_length": 32, "valid_fraction": 0.0},
            "optimizer": {"lr": 1e-2},
            "train": {"steps": 20, "batch_size": 4, "threads": 1} | train,
        }
        return parse_recipe(raw, SFTRecipe)

    return make


def test_fine_tuning_learns_the_answers(chat_recipe):
    run_dir = sft(chat_recipe())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    assert load_model(run_dir / "model").config.vocab_size == 262
    assert "loss on the assistant's turns" in (run_dir / "model" / "README.md").read_text()


def test_an_adapter_learns_the_answers_and_a_stopped_run_ends_the_same(chat_recipe, tmp_path):
    def recipe(name):
        made = chat_recipe(save_every=5, steps=15)
        return made.model_copy(update={"name": name, "lora": LoRASection(rank=8)})

    plan, whole = dry_run(recipe("a")), dry_run(chat_recipe(steps=15))
    assert plan["memory"]["moments"] < whole["memory"]["moments"]
    assert 0.6 < plan["flops_per_token"] / whole["flops_per_token"] < 0.8  # no gradients of weights
    run_dir = sft(recipe("a"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    merged, base = load_model(run_dir / "model"), load_model(tmp_path / "base")
    adapter = read_adapter(run_dir / "adapter")
    assert adapter.base == str(tmp_path / "base")
    merge(base, adapter.updates)
    assert all(torch.equal(t, merged.state_dict()[name]) for name, t in base.state_dict().items())

    with stopped_after(8):
        sft(recipe("b"))
    resumed = load_model(sft(recipe("b"), resume=True) / "model")
    assert all(torch.equal(t, merged.state_dict()[name]) for name, t in resumed.state_dict().items())
    with pytest.raises(UserError, match=r"lora.targets: 'nothing'"):
        dry_run(recipe("c").model_copy(update={"lora": LoRASection(targets=["nothing"])}))


def test_what_the_release_says_is_kept_from_run_to_run(chat_recipe, tmp_path):
    """Sampling and all end tokens; the second run takes the first one's folder for its model."""
    own = {"do_sample": True, "temperature": 0.3, "top_p": 0.8, "eos_token_id": [7, 0]}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(own))
    for name, base in (("first", tmp_path / "base"), ("second", tmp_path / "runs" / "first")):
        recipe = chat_recipe(steps=1)
        recipe.name, recipe.model.path = name, str(base)
        made = json.loads((sft(recipe) / "model" / "generation_config.json").read_text())
        assert {key: made.get(key) for key in own} == own
    assert Engine(tmp_path / "runs" / "second").end_tokens == (0, 7)


def test_a_tokenizer_without_an_end_token_takes_the_models(chat_recipe, tmp_path):
    settings = tmp_path / "base" / "tokenizer_config.json"
    said = json.loads(settings.read_text())
    del said["eos_token"]
    settings.write_text(json.dumps(said))
    assert load_tokenizer(tmp_path / "base").eos_token_id is None
    assert tokenizer_of(chat_recipe().model).eos_token_id == 0


def test_the_tokenizer_must_fit_the_model(chat_recipe, tmp_path):
    bigger = train_tokenizer(["say yes no"], TokenizerSection(vocab_size=300, special_tokens=["a1", "b2", "c3", "d4"]))
    save_tokenizer(bigger, tmp_path / "base")
    with pytest.raises(UserError, match=f"base: the model has 262 tokens and the tokenizer {len(bigger)}"):
        sft(chat_recipe())


SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "tie_word_embeddings": True,
    "num_nextn_predict_layers": 1,
}  # fmt: skip


def from_scratch(recipe, **changes):
    raw = recipe.model_dump() | {"model": {"config": SMALL}, "tokenizer": {"path": recipe.model.path}} | changes
    return parse_recipe(raw, SFTRecipe)


def test_fine_tuning_from_random_weights(chat_recipe, tmp_path):
    """With another model's tokenizer, template and end tokens; a stopped run ends the same."""
    base = tmp_path / "base"
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0], "temperature": 0.3}))
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    recipe = from_scratch(chat_recipe(steps=12, save_every=5))
    plan = dry_run(recipe.model_copy(deep=True))
    assert not recipe.run_dir.exists()
    run_dir = sft(recipe)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    engine = Engine(run_dir)
    assert (
        sum(p.numel() for p in load_model(run_dir / "model").parameters())
        == plan["parameters_total"] + plan["parameters_mtp"]
    )
    assert engine.end_tokens == (0, 7)
    assert "temperature" not in json.loads((run_dir / "model" / "generation_config.json").read_text())
    conversation = [{"role": "user", "content": "say yes"}]
    text = engine.tokenizer.apply_chat_template(conversation, tokenize=False)
    assert text == "say yes"
    assert "from random weights" in (run_dir / "model" / "README.md").read_text()

    again = from_scratch(chat_recipe(steps=12, save_every=5), name="again")
    with stopped_after(8):
        sft(again)
    sft(from_scratch(chat_recipe(steps=12, save_every=5), name="again"), resume=True)
    whole, resumed = ((folder / "model" / "model.safetensors").read_bytes() for folder in (run_dir, again.run_dir))
    assert whole == resumed
    (base / "chat_template.jinja").write_text("another")
    with pytest.raises(UserError, match=r"chat_template\.jinja has changed since"):
        sft(from_scratch(chat_recipe(steps=12, save_every=5), name="again"), resume=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"tokenizer": None},
            r"tokenizer\.path is missing: with model\.config there is no model to take a tokenizer from",
        ),
        ({"model": {"path": "base"}}, r"tokenizer\.path = '.*base' with model\.path: the model has its own"),
        ({"lora": {}}, r"lora with model\.config: adapters are not trained so"),
        ({"tokenizer": {"path": "nowhere"}}, r"nowhere.* does not exist"),
        (
            {"model": {"config": SMALL | {"vocab_size": 9}}},
            r"model\.config\.vocab_size = 9: the tokenizer has 262 tokens",
        ),
        ({"model": {"config": {"n_layers": 2}}}, r"field model\.config\.n_layers is unknown"),
    ],
)
def test_random_weights_are_refused_with_a_sentence(chat_recipe, changes, sentence):
    for run in (dry_run, sft):
        with pytest.raises(UserError, match=sentence):
            run(from_scratch(chat_recipe(), **changes))


def test_dry_run_of_sft(chat_recipe):
    recipe = chat_recipe()
    plan = dry_run(recipe)
    assert plan["tokens"] == 20 * 4 * 32
    assert not recipe.run_dir.exists()


def test_dry_run_refuses_what_cannot_be_trained(chat_recipe, tmp_path):
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    packed = shutil.copytree(chat_recipe().model.path, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "compressed-tensors"}})
    )
    for path, message in (
        (tmp_path / "q4.gguf", "q4.gguf is a GGUF file, where a model directory is needed; make one: rorqual import"),
        (packed, "quant_method 'compressed-tensors' is not supported"),
    ):
        for start in (dry_run, sft):
            recipe = chat_recipe()
            recipe.model.path = str(path)
            with pytest.raises(UserError, match=message):
                start(recipe)


def test_dry_run_says_what_a_run_takes_and_starts_nothing(make_recipe):
    recipe = make_recipe(train__steps=1000, train__batch_ramp=[2, 0.5])
    plan = dry_run(recipe)
    assert plan["tokens"] == 1000 * 3.5 * 32
    assert plan["seconds"] == pytest.approx(plan["tokens"] / plan["tokens_per_second"])
    assert plan["parameters_total"] > plan["parameters_active"] > 10_000
    text = plan_text(plan)
    assert "parameters" in text
    assert "active per token" in text
    assert "tokens/s at" in text
    assert "rorqual plan --calibrate" in text
    assert not recipe.run_dir.exists()


def test_dry_run_of_epochs_and_of_seconds(make_recipe):
    epochs = dry_run(make_recipe(train__steps=None, train__epochs=2.0))
    assert epochs["tokens"] is epochs["seconds"] is None
    assert "known once the data is packed" in plan_text(epochs)
    assert dry_run(make_recipe(train__steps=None, train__seconds=60.0))["seconds"] == pytest.approx(60)


def test_the_tiny_recipes_run_on_a_users_text(tmp_path, corpus):
    recipes = Path(__file__).parents[2] / "recipes"
    out = f"out={tmp_path}"
    short = ["train.seconds=0.5", "train.threads=1", "train.batch_size=4", "data.valid_fraction=0.05"]
    text = f'data.sources=[{{path="{corpus}"}}]'
    base = pretrain(load_recipe(recipes / "pretrain-tiny.toml", PretrainRecipe, [out, text, *short]))
    (tmp_path / "chats.jsonl").write_text('{"prompt": "say yes", "completion": "no"}\n' * 8)
    words = [out, f"model.path={base}/model", f"data.path={tmp_path}/chats.jsonl", "data.valid_fraction=0.0"]
    run_dir = sft(load_recipe(recipes / "sft-tiny.toml", SFTRecipe, words))
    assert (run_dir / "model" / "model.safetensors").exists()


def test_rounded_products_take_longer_and_processes_have_no_time(make_recipe):
    plain, rounded = (dry_run(make_recipe(train__steps=10, precision=p)) for p in (None, "fp8"))
    assert rounded["tokens_per_second"] == pytest.approx(plain["tokens_per_second"] / 1.4)
    recipe = make_recipe(train__steps=10)
    one, two = (_forecast(recipe_config(recipe), recipe, 10, processes) for processes in (1, 2))
    assert one["tokens_per_second"] > 0
    assert one.keys() - two.keys() == {
        "tokens_per_second", "tokens_per_second_interval", "seconds", "utilisation", "calibration"
    }  # fmt: skip
