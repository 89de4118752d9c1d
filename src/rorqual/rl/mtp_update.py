"""The multi-token module trained along with the policy, so that its drafts stay the policy's (V3 §2.2, §5.4.3).

Its loss is on the rollout's own tokens, at the temperature they were sampled at:

    λ/depth · Σ_k 1/N Σ_t −log q_k(o_{t+1+k} | …)      V3 eq. 24–25, with the N tokens of all completions

What the module reads (hidden states, embedding, head) is taken as given: the loss changes the module alone, and the
policy has the gradient it has without it. Where completions share a prompt, the module sees the first one's beginning
after the prompt's last token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.kernels.cross_entropy import token_logprobs
from rorqual.model import Transformer
from rorqual.recipe import RLRecipe
from rorqual.rl.rollout_packing import PackedRollout
from rorqual.shapes import Float, Int


class MTPUpdate:
    """Adds the gradients of the multi-token modules' loss. `nats` and `predicted` count since `begin`."""

    def __init__(self, model: Transformer, recipe: RLRecipe) -> None:
        self.model, self.λ, self.temperature = model, recipe.mtp.weight, recipe.grpo.temperature
        modules = model.mtp_modules
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.depth = len(modules)
        self.begin()

    def begin(self) -> None:
        self.nats, self.predicted = 0.0, 0

    @property
    def loss(self) -> float | None:
        """Nats a predicted token; None where none was."""
        return self.nats / self.predicted if self.predicted else None

    def backward(self, hidden: Float[Tensor, "1 T D"], packed: PackedRollout, batches: Sequence[PackedRollout]) -> None:
        """Add gradients for one of an update's micro-batches `batches`, from the policy's last hidden states."""
        total = sum(len(each.targets) for each in batches)
        states = self.model.mtp_hidden_states(hidden.detach(), packed.tokens, packed.positions, packed.mask)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for k, state in enumerate(states):
            rows, targets = predictions(packed, k + 1)
            if not len(rows):
                continue
            head = self.model.head_weight.detach()
            nats = -token_logprobs(state[0].index_select(0, rows), head, targets, self.temperature)[0].sum()
            loss = loss + self.λ / (self.depth * total) * nats
            self.nats, self.predicted = self.nats + float(nats.detach()), self.predicted + len(rows)
        if loss.requires_grad:
            torch.autograd.backward(loss, inputs=self.parameters)


def predictions(packed: PackedRollout, ahead: int) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"]]:
    """The T tokens that stand in a completion with at least `ahead` + 1 more after them, and the last of these.

    Not a prompt's last token, after which several completions go on.
    """
    sequence, count = packed.sequence, len(packed.sequence) - ahead
    if count <= 1:
        return packed.source[:0], packed.targets[:0]
    at = torch.arange(1, count, device=sequence.device)
    inside = (sequence[at - 1] == sequence[at]) & (sequence[at] == sequence[at + ahead])
    inside &= packed.source[at + ahead] == packed.source[at] + ahead  # no turn of an environment between them
    at = at[inside]
    return packed.source[at], packed.targets[at + ahead]
