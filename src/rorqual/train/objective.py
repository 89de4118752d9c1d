"""What a training step minimises, and sums over its micro-batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.data.loader import Batch
from rorqual.kernels.cross_entropy import linear_cross_entropy
from rorqual.model import Transformer
from rorqual.model.moe import Routing


class Objective:
    """Weighted mean of cross-entropy + λ/depth · Σ MTP losses (V3 eq. 25) + α · sequence-wise balance loss (eq. 17).

    Micro-batches add up to the mean over the step: `totals` are the step's sums of token weights, for the main loss and
    then for each MTP depth that is computed, and `sequences` its number of sequences, of all processes.
    """

    def __init__(
        self, model: Transformer, totals: Sequence[float], λ: float, sequence_loss: float, sequences: float
    ) -> None:
        """sequence_loss: α."""
        self.model, self.totals, self.λ = model, totals, λ
        self.α, self.sequences = sequence_loss, sequences
        self.sums = torch.zeros(1 + model.config.num_nextn_predict_layers)  # main loss, then MTP losses
        self.finite = True

    def losses(self, hidden: Tensor, batch: Batch, routing: list[Routing]) -> Tensor:
        """Cross-entropies [] of the next token, and of those after it, from the last hidden states [B, T, D]."""
        model, mask = self.model, batch.attention_mask
        states = [hidden]
        if len(self.totals) > 1:
            following = [batch.following(depth) for depth in range(1, len(self.sums))]
            states += model.mtp_hidden_states(hidden, batch.inputs, batch.positions, mask, routing, following)
        parts: list[Tensor] = []
        for depth, (state, total) in enumerate(zip(states, self.totals, strict=True)):
            targets, weights = batch.ahead(depth)
            share = (weights / total).flatten()
            parts.append(linear_cross_entropy(state.flatten(0, 1), model.head_weight, targets.flatten(), share))
        loss = parts[0]
        for part in parts[1:]:
            loss = loss + self.λ / (len(self.sums) - 1) * part
        self.sums[: len(parts)] += torch.stack([p.detach() for p in parts]).to("cpu", torch.float32)
        return self._checked(loss)

    def auxiliary(self, routing: list[Routing], batch: Batch) -> Tensor | None:
        """The balance loss [] of some layers; None where there is none."""
        if not (self.α and routing):
            return None
        share = self.α * len(batch.inputs) / self.sequences
        total = sum((r.sequence_loss for r in routing), routing[0].sequence_loss.new_zeros(()))
        return self._checked(share * total)

    def _checked(self, loss: Tensor) -> Tensor:
        self.finite = self.finite and bool(torch.isfinite(loss.detach()))
        return loss
