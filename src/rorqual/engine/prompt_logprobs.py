"""How probable a text is to a model, token by token."""

import torch
from torch import Tensor

from rorqual.kernels.linear import linear

CHUNK = 256  # places whose logits are held at a time

Ranked = list[tuple[int, float]]


class PromptLogprobs:
    """Log-probability of every token of a text given those before it (None for the first), and the `top` most probable
    there; they grow with the hidden states that `read` gets.
    """

    def __init__(self, tokens: tuple[int, ...], head: Tensor, top: int) -> None:
        self.tokens, self._head, self._top = tokens, head, top
        self.logprobs: list[float | None] = [None]
        self.ranked: list[Ranked] = [[]]

    @property
    def done(self) -> bool:
        return len(self.logprobs) == len(self.tokens)

    def read(self, states: Tensor, start: int) -> None:
        """The hidden states [M, D] of the tokens from place `start` on, which say what comes after each."""
        del self.logprobs[start + 1 :], self.ranked[start + 1 :]  # where the text is read again
        targets = torch.tensor(self.tokens[start + 1 : start + 1 + len(states)], device=states.device)
        for some, following in zip(states[: len(targets)].split(CHUNK), targets.split(CHUNK), strict=True):
            logp = linear(some, self._head).float().log_softmax(-1)
            self.logprobs += logp.gather(1, following.unsqueeze(1)).squeeze(1).tolist()
            best = logp.topk(max(1, min(self._top, logp.shape[-1])))
            self.ranked += [
                list(zip(*pair, strict=True))[: self._top]
                for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
