"""How probable a text is to a model, token by token."""

import torch

from rorqual.errors import UserError
from rorqual.kernels.linear import linear
from rorqual.model import Transformer

CHUNK = 256  # places whose logits are held at a time

Ranked = list[tuple[int, float]]


@torch.inference_mode()
def score(model: Transformer, tokens: list[int], top: int) -> tuple[list[float | None], list[Ranked]]:
    """Log-probability of every token given those before it (None for the first), and the `top` most probable there.

    Raises UserError for more tokens than the model's context holds, or ids it does not have.
    """
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if not 0 < len(tokens) <= context:
        raise UserError(f"a text of {len(tokens)} tokens cannot be scored; the model's context holds {context}")
    if not all(0 <= t < vocabulary for t in tokens):
        raise UserError(f"token ids must be from 0 to {vocabulary - 1}")
    ids = torch.tensor([tokens], device=model.head_weight.device)
    hidden = model(ids)[0]
    logprobs: list[float | None] = [None]
    ranked: list[Ranked] = [[]]
    for start in range(0, len(tokens) - 1, CHUNK):
        targets = ids[0, start + 1 : start + 1 + CHUNK]
        logp = linear(hidden[start : start + len(targets)], model.head_weight).float().log_softmax(-1)
        logprobs += logp.gather(1, targets.unsqueeze(1)).squeeze(1).tolist()
        best = logp.topk(max(1, min(top, vocabulary)))
        ranked += [
            list(zip(*pair, strict=True))[:top]
            for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    return logprobs, ranked
