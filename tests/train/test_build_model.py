import pytest

from rorqual.checkpoint.huggingface import save_model
from rorqual.data.tokenizer import train_tokenizer
from rorqual.errors import UserError
from rorqual.model import ModelConfig, Transformer
from rorqual.recipe import DataSection, ModelSection, SFTRecipe, TokenizerSection, parse_recipe
from rorqual.train.build_model import check_length, model_config
from rorqual.train.dry_run import dry_run
from rorqual.train.training_run import pretrain, sft

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("own", "length", "context"), [({}, 256, 4096), ({}, 4608, 4608), ({"max_position_embeddings": 64}, 64, 64)]
)
def test_the_context_holds_what_was_trained(own, length, context):
    section = ModelSection(config=LLAMA | own)
    check_length(section, DataSection(sources=[{"path": "a.txt"}], sequence_length=length))
    assert model_config(section, 300, length=length).max_position_embeddings == context


def test_training_beyond_the_context_is_refused_before_the_start(make_recipe, tmp_path):
    recipe = make_recipe(data__sequence_length=65)
    recipe.model.config["max_position_embeddings"] = 64
    for run in (pretrain, dry_run):
        with pytest.raises(UserError, match=r"data\.sequence_length = 65: .* holds 64 .*raise model\.config"):
            run(recipe)
    tokenizer = train_tokenizer(["a"], TokenizerSection(vocab_size=257))
    config = ModelConfig.from_dict(LLAMA | {"vocab_size": len(tokenizer), "max_position_embeddings": 64})
    save_model(Transformer(config), tmp_path / "m", tokenizer)
    raw = {
        "name": "r", "out": str(tmp_path / "runs"), "model": {"path": str(tmp_path / "m")},
        "data": {"path": "none.jsonl", "sequence_length": 65}, "train": {"steps": 1},
    }  # fmt: skip
    for run in (sft, dry_run):
        with pytest.raises(UserError, match=r"data\.sequence_length = 65: .* holds 64 .*lower it$"):
            run(parse_recipe(raw, SFTRecipe))
    assert not (tmp_path / "runs").exists()
    del raw["data"]["sequence_length"]
    left_open = parse_recipe(raw, SFTRecipe)
    dry_run(left_open)
    assert left_open.data.sequence_length == 64
