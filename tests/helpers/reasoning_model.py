"""A tiny DeepSeek-V3-style model of random weights, whose chat template opens `<think>`."""

import torch

from rorqual.checkpoint.huggingface import save_model
from rorqual.data.tokenizer import save_tokenizer, train_tokenizer
from rorqual.model import ModelConfig, Transformer
from rorqual.recipe import TokenizerSection

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think is not defined or think %}<think>{% endif %}{% endif %}"
)


def save_reasoner(path):
    """Write the model and its tokenizer to the directory `path`, and return it."""
    section = TokenizerSection(
        vocab_size=300, special_tokens=["<|user|>", "<|assistant|>", "<|system|>", "<think>", "</think>"]
    )
    tokenizer = train_tokenizer(["what is 12 and 7, or the sum of both? é 🐋"] * 3, section)
    tokenizer.chat_template = TEMPLATE
    config = ModelConfig(
        model_type="deepseek_v3", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16,
        first_k_dense_replace=1, initializer_range=0.2, max_position_embeddings=2048, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(Transformer(config), path, tokenizer)
    save_tokenizer(tokenizer, path)
    return path
