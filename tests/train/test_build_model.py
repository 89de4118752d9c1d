import pytest
import torch

from rorqual.checkpoint.huggingface import save_model
from rorqual.data.tokenizer import train_tokenizer
from rorqual.errors import UserError
from rorqual.model import ModelConfig, Transformer
from rorqual.parallel.mesh import planned_mesh
from rorqual.recipe import (
    DataSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    ScheduleSection,
    SFTRecipe,
    TokenizerSection,
    parse_recipe,
)
from rorqual.train.build_model import build_model, build_part, check_length, model_config
from rorqual.train.dry_run import dry_run
from rorqual.train.trainer import Trainer
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


MIXTURE = {
    "model_type": "deepseek_v3", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
QWEN = LLAMA | {"model_type": "qwen2", "num_hidden_layers": 3, "tie_word_embeddings": True}  # with biases


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        (MIXTURE, {"pipeline": 2, "data": 2, "experts": 2}),
        (MIXTURE, {"data": 4, "experts": 4, "sharding": "full"}),
        (QWEN, {"pipeline": 3, "schedule": "1f1b"}),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_part_has_the_numbers_of_the_whole(sizes, layout, loaded, tmp_path):
    tokenizer = train_tokenizer(["a"], TokenizerSection(vocab_size=257))
    section = ModelSection(config=sizes)
    if loaded:
        torch.manual_seed(7)
        model = Transformer(model_config(section, len(tokenizer)))
        for buffer in model.buffers():
            buffer.normal_()
        save_model(model, tmp_path / "m", tokenizer)
        section = ModelSection(path=str(tmp_path / "m"))
    parallel = ParallelSection(ranks_per_node=2, **layout)
    for rank in range(parallel.processes):
        parts, states = [], []
        for build in (lambda *how: (build_model(*how), None), build_part):
            model, fill = build(section, tokenizer, 3)
            trainer = Trainer(
                model, OptimizerSection(), ScheduleSection(), dtype="float32", mesh=planned_mesh(parallel, rank),
                micro_batches=8, device=torch.device("cpu"), fill=fill, notify=lambda _: None,
            )  # fmt: skip
            parts.append(trainer)
            states.append(torch.get_rng_state())
        whole, part = (t.model.state_dict() | {f"own.{n}": w for n, w in t.optimizer.own.items()} for t in parts)
        assert whole.keys() == part.keys()
        assert all(torch.equal(part[name], t) for name, t in whole.items() if t.untyped_storage().nbytes())
        assert torch.equal(*states)
