"""Log-probabilities of a prompt's tokens."""

import torch
from torch import Tensor

from rorqual.kernels.linear import linear

CHUNK_TOKENS = 256  # positions whose logits are in memory at a time

Ranked = list[tuple[int, float]]


class PromptLogprobs:
    """Log-probability of every token given those before it (None for the first), and the `top` most probable tokens
    there; `append` adds them as hidden states are computed.
    """

    def __init__(self, tokens: tuple[int, ...], head: Tensor, top: int) -> None:
        self.tokens, self._head, self._top = tokens, head, top
        self.logprobs: list[float | None] = [None]
        self.ranked: list[Ranked] = [[]]

    @property
    def done(self) -> bool:
        return len(self.logprobs) == len(self.tokens)

    def append(self, states: Tensor, start: int) -> None:
        """states [M, D]: hidden states of the tokens from position `start` on."""
        del self.logprobs[start + 1 :], self.ranked[start + 1 :]  # after preemption the prompt is prefilled again
        targets = torch.tensor(self.tokens[start + 1 : start + 1 + len(states)], device=states.device)
        for some, following in zip(
            states[: len(targets)].split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True
        ):
            logp = linear(some, self._head).float().log_softmax(-1)
            self.logprobs += logp.gather(1, following.unsqueeze(1)).squeeze(1).tolist()
            best = logp.topk(max(1, min(self._top, logp.shape[-1])))
            self.ranked += [
                list(zip(*pair, strict=True))[: self._top]
                for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
