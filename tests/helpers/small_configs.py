"""Configs small enough to compute every token by a full pass, and reference answers from such passes."""

import torch

from rorqual.model import ModelConfig

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

LATENT = ModelConfig(
    model_type="deepseek_v3", vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1,
    initializer_range=0.2, max_position_embeddings=40, eos_token_id=0,
)  # fmt: skip
GROUPED = ModelConfig(
    model_type="llama", vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=40, eos_token_id=0,
    rope_interleave=False,
)  # fmt: skip


def agree(found, expected, model):
    """Whether sampled answers are equal. On a GPU one may differ: there a product's rounding depends on the batch size,
    and now and then the random number lies between two tokens.
    """
    differ = sum(a != b for a, b in zip(found, expected, strict=True))
    return differ <= int(next(model.parameters()).is_cuda)


@torch.no_grad()
def logits(model, tokens):
    """Logits [B, T, V] of tokens [B, T], on the CPU."""
    return model.logits(torch.tensor(tokens, device=model.head_weight.device)).cpu()


@torch.no_grad()
def greedy_by_full_passes(model, prompt, count, to_the_end=False):
    """(tokens, logprobs) of greedy decoding without a KV cache; `to_the_end` ignores the end token."""
    tokens, logprobs = list(prompt), []
    for _ in range(count):
        logp = logits(model, [tokens])[0, -1].log_softmax(-1)
        tokens.append(int(logp.argmax()))
        logprobs.append(float(logp.max()))
        if tokens[-1] == 0 and not to_the_end:
            break
    return tokens[len(prompt) :], logprobs


@torch.no_grad()
def greedy_by_full_batches(model, prompts, count):
    """`count` tokens for each prompt by greedy decoding without a KV cache, whether or not the end token is among them.

    All prompts are computed together: what stands after a row's last token does not bear on it.
    """
    lengths = torch.tensor([len(p) for p in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()) + count, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    rows = torch.arange(len(prompts))
    for i in range(count):
        wanted = logits(model, tokens[:, : int(lengths.max()) + i].tolist())[rows, lengths + i - 1]
        tokens[rows, lengths + i] = wanted.argmax(-1)
    return [row[n : n + count].tolist() for row, n in zip(tokens, lengths.tolist(), strict=True)]
