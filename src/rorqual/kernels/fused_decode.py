"""A whole decode step in one call, for a model with quantised weights on a CPU (cpu/csrc/fused_decode.cpp).

The reference is the model itself: `Transformer.logits` gives the same up to rounding.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rorqual.kernels import cpu
from rorqual.kernels.quantized_linear import FORMATS, PANEL, QuantizedWeight
from rorqual.shapes import Float, Float32, Int32, Int64

Weights = tuple[QuantizedWeight, Tensor | None]  # with a bias


@dataclass(kw_only=True)
class LayerWeights:
    """A layer's tensors in the order of cpu/csrc/fused_decode/model.h; None where the layer has none."""

    attn_norm: Tensor
    q_a: Weights | None = None
    q_a_norm: Tensor | None = None
    q: Weights | None = None
    k: Weights | None = None
    v: Weights | None = None
    kv_a: Weights | None = None
    kv_a_norm: Tensor | None = None
    kv_b: Tensor | None = None
    o: Weights | None = None
    ffn_norm: Tensor
    gate: Weights | None = None  # these three also of shared experts
    up: Weights | None = None
    down: Weights | None = None
    router: Tensor | None = None
    correction: Tensor | None = None
    experts_in: Weights | None = None
    experts_out: Weights | None = None
    # Of the KV cache: keys and values [blocks, block, G, W], or latents [·, ·, C] and rotated keys [·, ·, R]; or as in
    # kernels/kv_int8.py or kernels/kv_fp8.py, with rotated keys in BF16.
    a: Tensor
    b: Tensor


QUANTIZED = {"q_a", "q", "k", "v", "kv_a", "o", "gate", "up", "down", "experts_in", "experts_out"}


@dataclass(kw_only=True)
class ModelSizes:
    """A model's sizes and options in the order of cpu/csrc/fused_decode/model.h; 0 where it has no such part."""

    hidden: int
    heads: int
    kv_heads: int
    rope_dim: int  # rotary width of a head: all of it, or MLA's rope part
    interleave: bool  # pairs of rotary embedding are (0,1),(2,3)…
    latent_dim: int = 0
    nope_dim: int = 0
    value_dim: int = 0
    experts: int = 0
    top_k: int = 0
    expert_groups: int = 1
    groups_kept: int = 1
    softmax: bool = False  # else sigmoid
    correction_bias: bool = False  # of V3 eq. 16
    group_limited: bool = False  # experts of the best groups only
    normalise: bool = False
    int8_kv: bool = False  # the KV cache is int8
    fp8_kv: bool = False  # the KV cache is FP8


@dataclass
class MTPJoin:
    """A multi-token module's input projection: embedding and hidden state, normed and concatenated (V3 eq. 21)."""

    embedding_norm: Tensor
    state_norm: Tensor
    weights: Weights


class FusedDecodeStep:
    """Raises ValueError for tensors whose dtype, device or strides the compiled function does not take."""

    def __init__(
        self, layers: list[LayerWeights], sizes: ModelSizes, embedding: QuantizedWeight, norm: Tensor,
        head: QuantizedWeight, frequencies: Tensor, factor: float, scale: float, eps: float, latent_eps: float = 0.0,
        routed_factor: float = 1.0, join: MTPJoin | None = None,
    ) -> None:  # fmt: skip
        """frequencies fp32 [F] and the factor of cos and sin: model/rope.py."""
        self._formats: set[str] = set()
        self._kept = (layers, embedding, norm, head, frequencies, join)  # the addresses below point to these
        self.dtype, self.vocab_size, self.hidden = norm.dtype, head.N, sizes.hidden
        self._cache_dtypes = norm.dtype, norm.dtype
        if sizes.int8_kv or sizes.fp8_kv:
            self._cache_dtypes = torch.uint8, torch.bfloat16 if sizes.latent_dim else torch.uint8
        self.block = PANEL if sizes.int8_kv else layers[0].a.shape[1]
        self._layers = torch.tensor([n for layer in layers for n in self._layer(layer)], dtype=torch.int64)
        whole = [
            self._layers.data_ptr(), len(layers), *(int(getattr(sizes, f.name)) for f in fields(sizes)),
            self._address(norm), *self._weights((embedding, None)), *self._weights((head, None)),
            self._address(frequencies, torch.float32),
        ]  # fmt: skip
        if join is None:
            whole += [0] * 8
        else:
            whole += [self._address(join.embedding_norm), self._address(join.state_norm), *self._weights(join.weights)]
        if len(self._formats) > 1 and "int8" in self._formats:  # int8 weights need activations of their own
            raise ValueError(f"weights of {', '.join(sorted(self._formats))} in one network")
        self._network = torch.tensor(whole, dtype=torch.int64)
        self._numbers = torch.tensor([factor, scale, eps, latent_eps, routed_factor])

    def __call__(
        self,
        tokens: Int64[Tensor, " n"],
        tables: Int32[Tensor, "n _"],
        lengths: Int32[Tensor, " n"],
        logit_rows: Int32[Tensor, " m"] | None = None,
        states: Float[Tensor, "n D"] | None = None,
    ) -> tuple[Float32[Tensor, "m V"], Float32[Tensor, "n D"]]:
        """The tokens, each the last of lengths[i] of the sequence with the block table tables[i]; those of one sequence
        are adjacent, in order, and its newest → logits of the tokens `logit_rows` (ascending; None: all), and the
        hidden states after the last norm. Writes the KV cache. A multi-token module also takes the model's hidden
        states at the positions before.
        """
        n = len(tokens)
        m = n if logit_rows is None else len(logit_rows)
        logits, hidden = torch.empty(m, self.vocab_size), torch.empty(n, self.hidden)
        cpu.call(
            "fused_decode", self.dtype, self._network, tokens.contiguous(),
            None if states is None else states.float().contiguous(), n, tables, tables.stride(0), self.block, lengths,
            self._numbers, hidden, logit_rows, m, logits,
        )  # fmt: skip
        return logits, hidden

    def _layer(self, layer: LayerWeights) -> list[int]:
        numbers: list[int] = []
        a, b = self._cache_dtypes
        own = {"router": torch.float32, "correction": torch.float32, "a": a, "b": b}
        for f in fields(layer):
            value = getattr(layer, f.name)
            if f.name in QUANTIZED:
                numbers += [0] * 6 if value is None else self._weights(value)
            else:
                numbers.append(0 if value is None else self._address(value, own.get(f.name)))
        return numbers

    def _weights(self, weights: Weights) -> list[int]:
        packed, bias = weights
        self._formats.add(packed.format)
        return [
            self._address(packed.data, torch.uint8),
            0 if packed.channels is None else self._address(packed.channels, torch.float32),
            0 if bias is None else self._address(bias, self.dtype),
            FORMATS.index(packed.format), packed.N, packed.K,
        ]  # fmt: skip

    def _address(self, tensor: Tensor, dtype: torch.dtype | None = None) -> int:
        if not tensor.is_cpu or not tensor.is_contiguous() or tensor.dtype != (dtype or self.dtype):
            raise ValueError(f"a tensor of {tensor.dtype} on {tensor.device}, strides {tensor.stride()}")
        return tensor.data_ptr()
