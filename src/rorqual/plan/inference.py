"""Seconds of an engine on one or more chips: prefill, and decode steps of a batch.

A mixture of experts spreads its routed experts over the chips of an instance; each chip has sequences of its own and
all other weights (as DeepSeek serves V3). A dense model shares each product among the chips (tensor parallelism).
"""

from dataclasses import dataclass

from rorqual.model.config import ModelConfig
from rorqual.plan.chips import Chip
from rorqual.plan.cost import cache_bytes_per_token, flops_by_layer, layer_parameters, parameters
from rorqual.plan.expected_rows import expected_rows, row_bytes
from rorqual.plan.step_time import GROUPED, IMBALANCE, LINK_SHARE

BANDWIDTH_SHARE = 0.8  # of the memory's bandwidth that decoding reaches
LAYER_SECONDS = 20e-6  # a decode step's launches and gaps, for each layer
MESSAGE_SECONDS = 60e-6  # of an exchange between nodes, whatever its size; DeepEP: 77 µs for 8 ranks, with data
REDUCE_SECONDS = 10e-6  # the same within a node
MIXTURE_DECODE = (
    0.64  # of the speed so computed that a mixture over several chips reaches: SGLang's, published_serving.py
)
RESERVED = 0.1  # share of the memory that is for neither weights nor cache
SIZES = {"float32": 4.0, "bfloat16": 2.0, "fp8": 1.0, "int4": 0.5}  # bytes of a weight


def smallest_instance(
    config: ModelConfig, chip: Chip, most: int, weights: str, utilisation: float, tokens: float
) -> "Instance | None":
    """The fewest chips, a power of two, whose caches hold so many tokens; a dense model's share a node. None: no."""
    most = most if config.n_routed_experts else min(most, chip.per_node)
    for power in range(most.bit_length()):
        found = Instance(config, chip, 1 << power, weights, utilisation=utilisation)
        if found.cache_tokens() >= tokens:
            return found
    return None


@dataclass(frozen=True)
class Instance:
    """A copy of a model on `chips` chips. weights: a key of SIZES; products are computed in FP8 where weights are."""

    config: ModelConfig
    chip: Chip
    chips: int
    weights: str = "bfloat16"
    cache: str = "bfloat16"  # or fp8
    utilisation: float = 0.5
    imbalance: float = IMBALANCE

    @property
    def cache_bytes(self) -> float:
        """Of a token of context, in all layers."""
        return cache_bytes_per_token(self.config, 1) * SIZES[self.cache]

    @property
    def is_mixture(self) -> bool:
        return bool(self.config.n_routed_experts)

    @property
    def routed(self) -> int:
        """Parameters of all routed experts."""
        config = self.config
        return self._mixtures * layer_parameters(config, True).routed if self.is_mixture else 0

    @property
    def rate(self) -> float:
        """FLOP/s of products on a chip."""
        return self.chip.rate("fp8" if self.weights == "fp8" else "bfloat16") * self.utilisation

    def weight_bytes(self) -> float:
        """Of a chip."""
        total, size = parameters(self.config)[0], SIZES[self.weights]
        if not self.is_mixture:
            return size * total / self.chips
        return size * (total - self.routed + self.routed / self.chips)

    def cache_tokens(self) -> float:
        """Tokens of context that the caches of all chips hold."""
        room = (1 - RESERVED) * self.chip.memory - self.weight_bytes()
        return max(0.0, room) * self.chips / self.cache_bytes

    def decode_seconds(self, batch: float, context: float) -> float:
        """Of a step in which each of `batch` sequences, with so much context on average, gets a token."""
        config, chip, n = self.config, self.chip, self.chips
        bandwidth = chip.bandwidth * BANDWIDTH_SHARE
        size, own = SIZES[self.weights], batch / n
        total, active = parameters(config)
        routed_active = self._routed_active()
        # All products but routed experts: weights are read once, for all of a chip's sequences.
        rest = size * (total - self.routed - config.vocab_size * config.hidden_size * (not config.tie_word_embeddings))
        if self.is_mixture:
            products = max(rest / bandwidth, 2 * (active - routed_active) * own / self.rate)
        else:
            products = max(rest / n / bandwidth, 2 * active * own / self.rate)
        cache = own * context * self.cache_bytes / bandwidth
        core = max(cache, own * context * self._attention_flops() / (chip.rate("bfloat16") * self.utilisation))
        experts = travel = 0.0
        if self.is_mixture:
            share = config.moe.num_experts_per_tok / config.moe.n_routed_experts
            touched = 1 - (1 - share) ** batch
            experts = max(
                size * self.routed / n * touched / bandwidth,
                2 * routed_active * own * (1 + self.imbalance * (n > 1)) / (self.rate * GROUPED),
            )
            travel = self._decode_travel(own)
        elif n > 1:
            once = 2 * batch * config.hidden_size * 2 * (n - 1) / n / (LINK_SHARE * chip.within)
            travel = 2 * config.num_hidden_layers * (once + REDUCE_SECONDS)
        computed = products + core + experts + config.num_hidden_layers * LAYER_SECONDS
        # Two halves of a batch take turns, so that tokens of a mixture travel behind the other's computing.
        return max(computed, travel) / MIXTURE_DECODE if self.is_mixture else computed + travel

    def prefill_seconds(self, length: float, cached: float = 0.0) -> float:
        """Of a prompt of so many tokens on the instance, where many are computed together; cached: tokens of them that
        the cache has."""
        config, chip = self.config, self.chip
        new = length - cached
        flops = flops_by_layer(config, 1)
        # Each new token attends to what is before it; `flops` has half a token of context.
        attention = sum(f.attention for f in flops) * 2 * (cached + new / 2)
        routed = 2.0 * self._routed_active()
        rest = sum(f.products for f in flops) - routed
        busiest = 1 + self.imbalance * (self.chips > 1)
        a_token = rest / self.rate + routed * busiest / (self.rate * GROUPED)
        a_token += attention / (chip.rate("bfloat16") * self.utilisation)
        travel = 0.0
        if self.is_mixture:
            travel = self._prefill_travel()
        elif self.chips > 1:
            once = 4 * config.hidden_size * 2 * (self.chips - 1) / (LINK_SHARE * chip.within)
            a_token += config.num_hidden_layers * once
        return new * max(a_token, travel) / self.chips

    def _routed_active(self) -> int:
        if not self.is_mixture:
            return 0
        moe = self.config.moe
        return self.routed // moe.n_routed_experts * moe.num_experts_per_tok

    def _attention_flops(self) -> float:
        """Of a new token and one of its context, in all layers; MLA's in the latents (absorbed)."""
        config = self.config
        if config.is_mla:
            mla = config.mla
            widths = 2 * mla.kv_lora_rank + mla.qk_rope_head_dim
        else:
            widths = 2 * config.gqa.head_dim
        return 2.0 * config.num_hidden_layers * config.num_attention_heads * widths

    def _decode_travel(self, tokens: float) -> float:
        """Seconds of a chip's tokens to the experts and back, in all layers: once for each expert, FP8 there and BF16
        back, and two exchanges whose length does not count.
        """
        config, chip, n = self.config, self.chip, self.chips
        if n == 1:
            return 0.0
        rows, row = tokens * config.moe.num_experts_per_tok, config.hidden_size * (1 + 2)
        far, near = max(0.0, 1 - chip.per_node / n), (min(n, chip.per_node) - 1) / n
        seconds = max(rows * far * row / (LINK_SHARE * chip.between), rows * near * row / (LINK_SHARE * chip.within))
        return self._mixtures * (seconds + 2 * (MESSAGE_SECONDS if far else REDUCE_SECONDS))

    def _prefill_travel(self) -> float:
        """The same of one token of many, which crosses to a node once."""
        config, chip, n = self.config, self.chip, self.chips
        if n == 1:
            return 0.0
        rows = expected_rows(config, n, min(n, chip.per_node), "two-hop-fp8")
        there, back = row_bytes("two-hop-fp8", config.hidden_size, config.moe.num_experts_per_tok, 2)
        far, near = (rows.get(link, 0.0) for link in ("between nodes", "within a node"))
        return self._mixtures * (there + back) / LINK_SHARE * max(far / chip.between, near / chip.within)

    @property
    def _mixtures(self) -> int:
        return sum(self.config.is_moe_layer(i) for i in range(self.config.num_hidden_layers))
