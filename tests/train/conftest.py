"""Small models, batches, a corpus and a recipe for training tests."""

import functools
import os
import random

import pytest
import torch

from rorqual.data.loader import Batch
from rorqual.model import ModelConfig, Transformer
from rorqual.recipe import PretrainRecipe, parse_recipe
from rorqual.train import set_seed

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "initializer_range": 0.05,
}


@pytest.fixture
def make_model():
    """Builds a small DeepSeek-V3-style model with one MTP module; `changes` are config fields."""

    def make(seed: int = 0, **changes) -> Transformer:
        set_seed(seed)
        return Transformer(ModelConfig(model_type="deepseek_v3", vocab_size=64, **(SIZES | changes)))

    return make


@pytest.fixture
def make_batch():
    """Sequences that count upwards from a random start: learnable in a few steps."""

    def make(seed: int = 0, sequences: int = 4, length: int = 16, documents: bool = False) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        tokens = (torch.randint(0, 64, (sequences, 1), generator=generator) + torch.arange(length + 1)) % 64
        half = torch.arange(length) >= length // 2
        return Batch(
            inputs=tokens[:, :-1],
            targets=tokens[:, 1:],
            weights=torch.ones(sequences, length),
            positions=torch.arange(length).expand(sequences, length),
            documents=half.long().expand(sequences, length) if documents else None,
        )

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A text of invented words, about 60 KB."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    generator = random.Random(0)
    words = ["".join(generator.choice("abcdefgh") for _ in range(generator.randint(2, 6))) for _ in range(100)]
    path.write_text("\n".join(" ".join(generator.choice(words) for _ in range(20)) for _ in range(800)))
    return path


def recipe_in(folder, corpus, name="run", **changes):
    """A pre-training recipe that runs in about a second; `changes` are 'section__field' → value."""
    raw = {
        "name": name,
        "out": str(folder),
        "model": {"config": SIZES},
        "tokenizer": {"vocab_size": 300},
        "data": {
            "sources": [{"path": str(corpus)}],
            "valid_fraction": 0.2,
            "sequence_length": 32,
            "workers": 1,
        },
        "optimizer": {"name": "muon", "lr": 3e-3, "muon_lr": 3e-3},
        "train": {"steps": 12, "batch_size": 4, "eval_every": 4, "save_every": 4, "threads": 1},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        here = raw
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = value
    return parse_recipe(raw, PretrainRecipe)


@pytest.fixture
def make_recipe(tmp_path, corpus):
    """`recipe_in` of this test's folder."""
    return functools.partial(recipe_in, tmp_path / "runs", corpus)


@pytest.fixture(scope="module")
def make_recipe_of_module(tmp_path_factory, corpus):
    """The same for runs that several tests compare with."""
    return functools.partial(recipe_in, tmp_path_factory.mktemp("runs"), corpus)


@pytest.fixture
def child_environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
