"""Mixture of experts (DeepSeekMoE; V2 §2.2, V3 §2.1.2).

N tokens, D hidden, E routed experts, K active a token, F expert width. No token is ever dropped.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rorqual.kernels.linear import fp32_linear, grouped_linear, row_multiple
from rorqual.kernels.moe_permute import permute, permute_weights, sort_by_expert, unpermute
from rorqual.kernels.swiglu import swiglu_joined
from rorqual.kernels.typed_torch import not_compiled
from rorqual.model.config import ModelConfig
from rorqual.model.layers import SwiGLU
from rorqual.shapes import Float, Float32, Int, Int32, Int64


@dataclass
class Routing:
    """Statistics of one layer's router in one forward pass."""

    load: Int[Tensor, " E"]  # tokens sent to each expert
    sequence_loss: Float[Tensor, ""]  # the sequence-wise balance loss of V3 eq. 17–20, before its weight α


class Router(nn.Module):
    """Top-k gating: K experts a token and their weights (V3 eq. 12–16)."""

    e_score_correction_bias: Tensor  # [E] float32, where the method is noaux_tc

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        self.K, self.E = moe.num_experts_per_tok, moe.n_routed_experts
        self.groups, self.groups_kept = moe.n_group, moe.topk_group
        self.method, self.scoring = moe.topk_method, moe.scoring_func
        self.normalise, self.factor = moe.norm_topk_prob, moe.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.E, config.hidden_size))
        if self.method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(self.E, dtype=torch.float32))

    def forward(
        self, x: Float[Tensor, "N D"]
    ) -> tuple[Float32[Tensor, "N K"], Int64[Tensor, "N K"], Float32[Tensor, "N E"]]:
        """→ weights, chosen experts and scores."""
        scores = self.scores(x)
        with torch.no_grad():
            chosen = self._selection_scores(scores).topk(self.K, dim=-1, sorted=False).indices
        return self.gate_weights(scores, chosen), chosen, scores

    def scores(self, x: Float[Tensor, "N D"]) -> Float32[Tensor, "N E"]:
        """The affinities of tokens to experts (V3 eq. 15)."""
        logits = fp32_linear(x, self.weight)
        return logits.sigmoid() if self.scoring == "sigmoid" else logits.softmax(-1)

    def gate_weights(self, scores: Float32[Tensor, "N E"], chosen: Int64[Tensor, "N K"]) -> Float32[Tensor, "N K"]:
        """The weights of the chosen experts, from their scores alone (V3 eq. 13)."""
        weights = scores.gather(1, chosen)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.factor

    def _selection_scores(self, scores: Tensor) -> Tensor:
        """Scores for the choice only: with the correction bias, and zero or -inf outside the best groups."""
        biased = self.method == "noaux_tc"
        if biased:
            scores = scores + self.e_score_correction_bias  # V3 eq. 16: the bias never touches the weights
        if self.groups_kept == self.groups or self.method == "greedy":
            return scores
        by_group = torch.unflatten(scores, 1, (self.groups, -1))
        best = by_group.topk(2, dim=-1).values.sum(-1) if biased else by_group.amax(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(self.groups_kept, dim=-1).indices, True)
        return by_group.masked_fill(~kept.unsqueeze(-1), float("-inf") if biased else 0.0).flatten(1)


class Experts(nn.Module):
    """E SwiGLU networks, stacked for grouped matmuls."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, F_ = config.moe.n_routed_experts, config.hidden_size, config.moe.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))  # gate rows, then up rows
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))

    def forward(
        self, x: Float[Tensor, "M D"], weights: Float32[Tensor, " M"], ends: Int32[Tensor, " E"]
    ) -> Float[Tensor, "M D"]:
        """x is sorted by expert, expert e's rows ending at ends[e].

        A row's weight is applied before the last product, so that its gradient needs no output to be kept.
        """
        h = grouped_linear(x, self.gate_up_proj, ends)
        return grouped_linear(swiglu_joined(h, weights), self.down_proj, ends)


Dispatched = tuple[Float[Tensor, "N D"], Int[Tensor, " E"]]  # output, and load of each expert


class TokenDispatcher(Protocol):
    """Dispatches tokens to their experts and combines the outputs; replaced for expert parallelism.

    The output of `shared`, which can be computed while tokens travel, is added.
    """

    def __call__(
        self,
        experts: Experts,
        x: Float[Tensor, "N D"],
        weights: Float[Tensor, "N K"],
        chosen: Int[Tensor, "N K"],
        shared: SwiGLU | None = None,
    ) -> Dispatched: ...


class LocalDispatcher:
    """All experts are local: permute tokens by expert, run grouped matmuls, unpermute and sum."""

    @not_compiled  # shapes depend on the routing
    def __call__(
        self,
        experts: Experts,
        x: Float[Tensor, "N D"],
        weights: Float[Tensor, "N K"],
        chosen: Int[Tensor, "N K"],
        shared: SwiGLU | None = None,
    ) -> Dispatched:
        """→ output and load."""
        K, E = chosen.shape[1], len(experts.down_proj)
        permutation = sort_by_expert(chosen, E, row_multiple(x, experts.gate_up_proj, chosen.numel() // E))
        y = experts(permute(x, permutation, K), permute_weights(weights, permutation), permutation.ends)
        out = unpermute(y, permutation, K)
        return out if shared is None else out + shared(x), permutation.load


class MixtureOfExperts(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.dispatcher: TokenDispatcher = LocalDispatcher()
        width = config.moe.n_shared_experts * config.moe.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, width) if width else None

    def forward(self, x: Float[Tensor, "B T D"], routing: list[Routing] | None = None) -> Float[Tensor, "B T D"]:
        flat = x.flatten(0, -2)
        weights, chosen, scores = self.gate(flat)
        out, load = self.dispatcher(self.experts, flat, weights, chosen, self.shared_experts)
        if routing is not None:
            frequency = self.frequency(chosen.view(x.shape[0], -1), scores.shape[1])
            routing.append(Routing(load, sequence_balance_loss(scores, frequency)))
        return out.view_as(x)

    def frequency(self, chosen: Int[Tensor, "B choices"], experts: int) -> Float[Tensor, "B E"]:
        """How often each expert is chosen in each sequence; 1 where all are chosen alike (V3 eq. 18)."""
        counts = torch.zeros(len(chosen), experts, device=chosen.device)
        counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=counts.dtype))
        return counts * (experts / chosen.shape[1])  # f = E/(K·T) · count


def sequence_balance_loss(scores: Float[Tensor, "N E"], frequency: Float[Tensor, "B E"]) -> Float[Tensor, ""]:
    """Σ_e f_e·P_e averaged over sequences (V3 eq. 17–20); N = B · T."""
    shares = torch.unflatten(scores / scores.sum(-1, keepdim=True), 0, (len(frequency), -1)).mean(1)  # P [B, E]
    return (frequency * shares).sum(1).mean()
