"""The two forms of attention agree: all tokens at once, and one token at a time with a cache."""

import torch

from helpers.reference_models import CONFIGS, build
from rorqual.model.kv_cache import DecodeView, PrefillView

PLACES = 32  # a row is one block here


class RowCache:
    """Every sequence in a block of its own. `length` tokens are in it; the first pass brings several of each."""

    def __init__(self, rows):
        self.rows, self.length, self.stores = rows, 0, {}

    def append(self, layer, a, b):
        T = a.shape[1] // self.rows
        new = [x.unflatten(1, (self.rows, T))[0] for x in (a, b)]
        stores = self.stores.setdefault(layer, [x.new_zeros(self.rows, PLACES, *x.shape[2:]) for x in new])
        for store, x in zip(stores, new, strict=True):
            store[:, self.length : self.length + T] = x
        end = self.length + T
        if T == 1:
            tables = torch.arange(self.rows, dtype=torch.int32).unsqueeze(1)
            lengths = torch.full((self.rows,), end, dtype=torch.int32)
            return [DecodeView(slice(0, self.rows), *stores, tables, lengths)]
        rows = range(self.rows)
        return [PrefillView(slice(i * T, (i + 1) * T), *(store[i : i + 1, :end] for store in stores)) for i in rows]


def decode(model, tokens, pieces):
    """Logits of all positions after those of the first piece, and the cache; a piece is some tokens of every row."""
    cache, out = RowCache(len(tokens)), []
    for piece in tokens.split(pieces, dim=1):
        T = piece.shape[1]
        positions = (cache.length + torch.arange(T)).repeat(1, len(tokens))
        logits = model.logits(piece.reshape(1, -1), positions=positions, cache=cache)
        out.append(logits[0].unflatten(0, (len(tokens), T)))
        cache.length += T
    return torch.cat(out[1:], dim=1), cache


def test_decoding_agrees_with_one_forward_pass(ours, tokens):
    ones = [1] * (tokens.shape[1] - 5)
    with torch.no_grad():
        for pieces in ([5, *ones], [2, 3, *ones], [5, *ones[3:], 3]):
            found, _ = decode(ours, tokens, pieces)
            torch.testing.assert_close(found, ours.logits(tokens)[:, pieces[0] :], atol=1e-4, rtol=0)


def test_absorbed_equals_expanded(latent, tokens):
    attention = latent.model.layers[1].self_attn
    B, S = tokens.shape
    torch.manual_seed(0)
    q_nope, q_rope = torch.randn(B, 1, attention.H, attention.N), torch.randn(B, 1, attention.H, attention.R)
    past = torch.randn(B, PLACES, attention.C), torch.randn(B, PLACES, attention.R)
    tables = torch.arange(B, dtype=torch.int32).unsqueeze(1)
    with torch.no_grad():
        expanded = attention.expanded(q_nope, q_rope, *(x[:, :S] for x in past), None)
        singles = DecodeView(slice(0, B), *past, tables, torch.full((B,), S, dtype=torch.int32))
        absorbed = attention.absorbed(q_nope[:, 0], q_rope[:, 0], singles)
    torch.testing.assert_close(absorbed, expanded[:, 0], atol=1e-5, rtol=1e-5)


def test_latent_cache_holds_latents_only(tokens):
    model = build(CONFIGS["v3"])
    with torch.no_grad():
        _, cache = decode(model, tokens, [5, *[1] * (tokens.shape[1] - 5)])
    config = model.config
    held = sum(t[:, : cache.length].numel() for pair in cache.stores.values() for t in pair)
    assert held == tokens.numel() * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
