"""Small models and a tokenizer of bytes, numbers and the reasoning tags."""

import pytest
import torch

from rorqual.data.tokenizer import train_tokenizer
from rorqual.model import ModelConfig, Transformer
from rorqual.recipe import TokenizerSection

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


@pytest.fixture(scope="session")
def tokenizer():
    section = TokenizerSection(vocab_size=300, special_tokens=TAGS, whole_numbers=20)
    return train_tokenizer(["1 + 2 = 3"], section)


@pytest.fixture
def dense(tokenizer):
    """A llama-style model with one KV head."""
    return tiny_model(
        tokenizer, model_type="llama", intermediate_size=48, num_key_value_heads=1, tie_word_embeddings=True
    )


@pytest.fixture
def moe(tokenizer):
    """A DeepSeek-V3-style model with one MTP module."""
    return tiny_model(
        tokenizer,
        model_type="deepseek_v3",
        intermediate_size=32,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
    )


def tiny_model(tokenizer, **sizes):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    return Transformer(config)
