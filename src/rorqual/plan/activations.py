"""Bytes a token that a layer keeps for the backward pass, counted tensor by tensor.

D hidden, H heads, W width of queries and keys, C latent. In FP8 a linear keeps its input in codes of 1 byte and an FP32
scale for 128 of them; the linear after attention in 1.5 bytes (V3 §3.3.3). tests/plan/test_activations.py compares with
what PyTorch allocates.
"""

from dataclasses import dataclass

from rorqual.model import ModelConfig

RSTD = 4  # what a norm keeps beside its input: 1 / rms in FP32
FP32 = 4


@dataclass(frozen=True)
class Kept:
    """How activations are kept: bytes of a value, whether linears keep FP8, and what is computed again."""

    size: int
    fp8: bool = False
    recompute: str = "none"  # or v3, full
    context: int = 1  # ranks that share a sequence

    @property
    def seen(self) -> float:
        """Tokens whose keys and values a rank has, for each of its own (parallel/context.py): a rank of two pieces of a
        sequence of 2·context sees all up to each, 2·context + 1 pieces in all."""
        return self.context + 0.5 if self.context > 1 else 1.0

    def input(self, width: int) -> float:
        """Of a linear whose input nothing else keeps."""
        return width + FP32 * -(-width // 128) if self.fp8 else width * self.size


def layer_bytes(config: ModelConfig, moe: bool, kept: Kept) -> float:
    """Of one layer."""
    D = config.hidden_size
    if kept.recompute == "full":
        return D * kept.size
    norms = 2 * (D * kept.size + RSTD)
    if kept.recompute == "none":  # the outputs
        norms += 2 * D * kept.size if not kept.fp8 else D * kept.size if moe else 0  # in FP8 the router's input
    attention = _latent(config, kept) if config.is_mla else _grouped(config, kept)
    return norms + attention + _feed_forward(config, moe, kept)


def freed_bytes(config: ModelConfig, moe: bool, kept: Kept) -> float:
    """What a layer's forward pass makes and does not keep, since it is computed again or kept in FP8."""
    return layer_bytes(config, moe, Kept(kept.size, context=kept.context)) - layer_bytes(config, moe, kept)


def backward_bytes(config: ModelConfig, moe: bool, kept: Kept) -> float:
    """What one layer's backward pass has beside what the forward pass kept: the gradients of gate, up and their
    product, and what is computed again.
    """
    width = config.moe.num_experts_per_tok * config.moe.moe_intermediate_size if moe else config.intermediate_size
    return 3 * width * kept.size + freed_bytes(config, moe, kept)


def mtp_bytes(config: ModelConfig, kept: Kept) -> float:
    """What a multi-token module keeps beside its layer: three norms, and the input of its projection."""
    D = config.hidden_size
    return 3 * (D * kept.size + RSTD) + kept.input(2 * D)


def _latent(config: ModelConfig, kept: Kept) -> float:
    mla, H = config.mla, config.num_attention_heads
    low, C, W = mla.q_lora_rank or 0, mla.kv_lora_rank, mla.qk_head_dim
    found = (low + C + mla.qk_rope_head_dim) * kept.size + _output(H, mla.v_head_dim, max(W, mla.v_head_dim), kept)
    if not low and kept.recompute == "v3":
        found += H * W * kept.size  # queries before rotation
    if kept.fp8:  # queries and latents are projected from the same input, kept by each
        found += 2 * kept.input(config.hidden_size)
    if kept.recompute == "none":
        found += RSTD + kept.input(C) + (RSTD + kept.input(low) if low else 0)
        keys_and_values = H * (mla.qk_nope_head_dim + mla.v_head_dim)
        if mla.v_head_dim < W:  # values as wide as queries (model/attention.py)
            keys_and_values = H * W
        found += (H * W + kept.seen * (H * W + keys_and_values)) * kept.size
        if kept.context > 1:
            found += kept.context * (C + mla.qk_rope_head_dim) * kept.size  # gathered
    return found


def _grouped(config: ModelConfig, kept: Kept) -> float:
    gqa, H = config.gqa, config.num_attention_heads
    W, G = gqa.head_dim, gqa.num_key_value_heads
    heads = H + 2 * kept.seen * (
        H if kept.size == FP32 else G
    )  # torch's fused kernel has keys and values for every head
    inputs = 3 * kept.input(config.hidden_size) if kept.fp8 else 0
    return heads * W * kept.size + inputs + _output(H, W, W, kept)


def _output(H: int, V: int, computed: int, kept: Kept) -> float:
    """Attention's output of V values a head, the next linear's input. `computed`: values a head before a cut.

    In FP32 torch's fused kernel keeps its output, and the logarithm of each sum; in BF16 nothing does.
    """
    fused = kept.size == FP32
    found = H * (computed + 1) * FP32 if fused else 0
    if kept.fp8:
        return found + 1.5 * H * V + FP32 * -(-H * V // 128)
    return found if fused and computed == V else found + H * V * kept.size


def _feed_forward(config: ModelConfig, moe: bool, kept: Kept) -> float:
    if not moe:
        return _swiglu(config.hidden_size, config.intermediate_size, kept)
    sizes, D = config.moe, config.hidden_size
    K, F = sizes.num_experts_per_tok, sizes.moe_intermediate_size
    rows = D * kept.size if not kept.fp8 else 0  # sorted by expert
    routed = K * (rows + _swiglu(D, F, kept))
    shared = _swiglu(D, F * sizes.n_shared_experts, kept) if sizes.n_shared_experts else 0
    return routed + shared + FP32 * sizes.n_routed_experts + 34 * K  # scores; choices, places and weights


def _swiglu(D: int, width: int, kept: Kept) -> float:
    """gate, up and their product; in FP8 the input and gate and up, of which the product is computed again."""
    if kept.fp8:
        return kept.input(D) + 2 * kept.input(width)
    return 3 * width * kept.size
