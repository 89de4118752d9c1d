"""The two forms of attention agree: all tokens at once, and one token at a time with a cache."""

import torch
from networks import CONFIGS, build


class ListCache:
    def __init__(self):
        self.past = {}

    def append(self, layer, a, b):
        if layer in self.past:
            a, b = (torch.cat([old, new], dim=1) for old, new in zip(self.past[layer], (a, b), strict=True))
        self.past[layer] = a, b
        return a, b


def decode(model, tokens, prefill):
    """Logits of all positions after the first `prefill`, each made from one token and the cache."""
    cache, out = ListCache(), []
    model.logits(tokens[:, :prefill], cache=cache)
    for i in range(prefill, tokens.shape[1]):
        positions = torch.full((len(tokens), 1), i)
        out.append(model.logits(tokens[:, i : i + 1], positions=positions, cache=cache))
    return torch.cat(out, dim=1), cache


def test_decoding_agrees_with_one_forward_pass(ours, tokens):
    with torch.no_grad():
        found, _ = decode(ours, tokens, prefill=5)
        torch.testing.assert_close(found, ours.logits(tokens)[:, 5:], atol=1e-4, rtol=0)


def test_absorbed_equals_expanded(latent, tokens):
    attention = latent.model.layers[1].self_attn
    B, S = tokens.shape
    torch.manual_seed(0)
    q_nope, q_rope = torch.randn(B, 3, attention.H, attention.N), torch.randn(B, 3, attention.H, attention.R)
    past = torch.randn(B, S, attention.C), torch.randn(B, S, attention.R)
    mask = torch.rand(B, 1, 3, S) > 0.4
    with torch.no_grad():
        expanded = attention.expanded(q_nope, q_rope, *past, mask)
        absorbed = attention.absorbed(q_nope, q_rope, *past, mask)
    torch.testing.assert_close(absorbed, expanded, atol=1e-5, rtol=1e-5)


def test_latent_cache_holds_latents_only(tokens):
    model = build(CONFIGS["v3"])
    with torch.no_grad():
        _, cache = decode(model, tokens, prefill=5)
    config = model.config
    held = sum(t.numel() for pair in cache.past.values() for t in pair)
    assert held == tokens.numel() * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
