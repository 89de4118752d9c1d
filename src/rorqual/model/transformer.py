"""The transformer: embedding, layers, norm, head, and multi-token prediction modules (V3 §2).

B batch, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.kernels.dense_attention import Mask
from rorqual.kernels.linear import linear
from rorqual.kernels.rotary import Table
from rorqual.model.attention import GroupedQueryAttention, MultiHeadLatentAttention
from rorqual.model.config import ModelConfig
from rorqual.model.kv_cache import KVCache
from rorqual.model.layers import Embedding, Linear, RMSNorm, SwiGLU
from rorqual.model.moe import MixtureOfExperts, Routing
from rorqual.model.release_settings import ReleaseSettings
from rorqual.model.rope import rope_frequencies, rope_table
from rorqual.shapes import Float, Int


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        attention = MultiHeadLatentAttention if config.is_mla else GroupedQueryAttention
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.is_moe_layer(index):
            self.mlp: MixtureOfExperts | SwiGLU = MixtureOfExperts(config)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def run(
        self,
        x: Float[Tensor, "B T D"],
        table: Table,
        mask: Mask,
        cache: KVCache | None,
        routing: list[Routing] | None,
    ) -> Float[Tensor, "B T D"]:
        x = x + self.self_attn(self.input_layernorm(x), table, mask, cache)
        h = self.post_attention_layernorm(x)
        return x + (self.mlp(h, routing) if isinstance(self.mlp, MixtureOfExperts) else self.mlp(h))


class Layer(Block):
    """A layer of the main model."""

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        table: Table,
        mask: Mask,
        cache: KVCache | None,
        routing: list[Routing] | None,
    ) -> Float[Tensor, "B T D"]:
        return self.run(x, table, mask, cache, routing)


class MultiTokenModule(Block):
    """Predicts one token further, from the previous depth's hidden state and the next token's embedding (V3 eq. 21–23).

    Embedding and head are the main model's; `shared_head.norm` is its own, as in the release.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(
        self,
        h: Float[Tensor, "B T D"],
        embedded: Float[Tensor, "B T D"],
        table: Table,
        mask: Mask,
        cache: KVCache | None,
        routing: list[Routing] | None,
    ) -> Float[Tensor, "B T D"]:
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(h)], dim=-1))
        return self.shared_head["norm"](self.run(x, table, mask, cache, routing))


class Decoder(nn.Module):
    """All but the output head; `model` in the releases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        depth, mtp_depth = config.num_hidden_layers, config.num_nextn_predict_layers
        self.layers = nn.ModuleList(
            [Layer(config, i) for i in range(depth)] + [MultiTokenModule(config, depth + k) for k in range(mtp_depth)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A causal language model. Parameters are named as in the releases, routed experts stacked per layer.

    `released`: the settings of its release.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.released = config, ReleaseSettings.of(config)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = rope_frequencies(config)
        if self.head_weight.device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal with the config's standard deviation; norms 1, biases 0 (V3 §4.2)."""
        for name, p in self.named_parameters():
            self.started(name, p)

    @torch.no_grad()
    def started(self, name: str, p: Tensor) -> Tensor:
        """A parameter, filled with the numbers that it starts from."""
        if p.ndim >= 2:
            return p.normal_(std=self.config.initializer_range)
        return p.fill_(0.0 if name.endswith("bias") else 1.0)

    @property
    def head_weight(self) -> Tensor:
        """Output head [V, D]; a QuantizedWeight after quantisation."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def flops_config(self) -> ModelConfig:
        """Sizes by which its FLOPs are counted."""
        return self.config

    def config_dict(self) -> dict[str, Any]:
        """The Hugging Face `config.json` of its release."""
        return self.config.to_dict()

    @property
    def layers(self) -> list[Layer]:
        """The layers of the main model."""
        return [layer for layer in self.model.layers if isinstance(layer, Layer)]

    @property
    def mtp_modules(self) -> list[MultiTokenModule]:
        return [module for module in self.model.layers if isinstance(module, MultiTokenModule)]

    def moe_layers(self) -> list[MixtureOfExperts]:
        """Mixture-of-experts layers in the order of `routing`."""
        blocks = (block for block in self.model.layers if isinstance(block, Block))
        return [block.mlp for block in blocks if isinstance(block.mlp, MixtureOfExperts)]

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "#B T"] | None = None,
        mask: Mask = None,
        cache: KVCache | None = None,
        routing: list[Routing] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states after the last norm.

        Positions default to 0…T-1; the mask, true where a token attends (or several, see kernels/dense_attention.py),
        defaults to causal; `routing` collects one entry a mixture-of-experts layer.
        """
        x = self.run_layers(self.model.embed_tokens(tokens), self.layers, positions, mask, cache, routing)
        return self.model.norm(x)

    def run_layers(
        self,
        x: Float[Tensor, "B T D"],
        layers: Iterable[nn.Module],
        positions: Int[Tensor, "#B T"] | None = None,
        mask: Mask = None,
        cache: KVCache | None = None,
        routing: list[Routing] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The hidden states after `layers`, some of the model's; a pipeline stage."""
        table = self._rope_table(x, positions, x.dtype)
        for layer in layers:
            x = layer(x, table, mask, cache, routing)
        return x

    def logits(self, tokens: Int[Tensor, "B T"], **inputs: Tensor | KVCache | None) -> Float[Tensor, "B T V"]:
        """Takes forward's arguments."""
        return self.head(self(tokens, **inputs))

    def head(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Logits, from hidden states after the last norm."""
        return linear(hidden, self.head_weight)

    def mtp_hidden_states(
        self,
        hidden: Float[Tensor, "B T D"],
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "#B T"] | None = None,
        mask: Mask = None,
        routing: list[Routing] | None = None,
        following: Sequence[Int[Tensor, "B T"]] | None = None,
    ) -> list[Float[Tensor, "B T D"]]:
        """Hidden states of every multi-token depth k = 0, 1, …, whose position i predicts token i+2+k.

        `following`: each depth's input tokens, those k+1 after `tokens`, where `tokens` are not whole sequences. The
        last k+1 positions of a sequence lack theirs and must carry no loss.
        """
        table = self._rope_table(tokens, positions, hidden.dtype)
        states: list[Tensor] = []
        for depth, module in enumerate(self.mtp_modules):
            tokens = tokens.roll(-1, dims=1) if following is None else following[depth]
            hidden = module(hidden, self.model.embed_tokens(tokens), table, mask, None, routing)
            states.append(hidden)
        return states

    def mtp_forward(
        self,
        hidden: Float[Tensor, "1 N D"],
        following: Int[Tensor, "1 N"],
        positions: Int[Tensor, "1 N"],
        cache: KVCache,
    ) -> Float[Tensor, "1 N D"]:
        """The first multi-token module with a KV cache: hidden states and the token after each → hidden states that
        predict the token after that. Its layer index in the cache is num_hidden_layers.
        """
        return self.mtp_modules[0](
            hidden,
            self.model.embed_tokens(following),
            self._rope_table(following, positions, hidden.dtype),
            None,
            cache,
            None,
        )

    def _rope_table(self, tokens: Tensor, positions: Tensor | None, dtype: torch.dtype) -> Table:
        """tokens: [B, T, …]"""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        frequencies, factor = self.rope
        return rope_table(positions, frequencies.to(positions.device), factor, dtype)
