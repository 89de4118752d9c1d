"""A head start for arithmetic: number tokens that know their value.

With one token a whole number, a small model must otherwise learn from examples alone that 17 lies next to 18 and ends
like 27. Here the embedding and the head row of n start from sines and cosines of n at several periods: what networks
trained on addition were found to build for themselves (Nanda et al. 2023, arXiv 2301.05217, §4; Zhou et al. 2024,
2406.03445, who also initialise with it). Training goes on from there as ever.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rorqual.model import Transformer

PERIODS = (2, 4, 5, 8, 10, 16, 20, 25, 32, 50, 64, 100, 128, 200, 256, 400, 800)
SCALE = 0.3  # norm of a head row; an embedding's is √hidden times that


def number_features(numbers: Tensor) -> Tensor:
    """numbers [n] → unit vectors [n, 2·periods + 1]: cosines, sines, and the size itself."""
    angles = 2 * math.pi * numbers[:, None] / torch.tensor(PERIODS)
    features = torch.cat([angles.cos(), angles.sin(), numbers[:, None] / max(PERIODS)], dim=1)
    return features / features.norm(dim=1, keepdim=True)


@torch.no_grad()
def start_numbers(model: Transformer, tokenizer: Any) -> int:
    """Set the rows of every token that is a whole number, in a random orthonormal frame; gives how many there are.

    The hidden size must be at least 2·periods + 1 = 35.
    """
    pairs = [(int(token), i) for token, i in tokenizer.get_vocab().items() if token.isascii() and token.isdigit()]
    pairs = sorted((n, i) for n, i in pairs if tokenizer.decode([i]) == str(n))  # not 007
    features = number_features(torch.tensor([float(n) for n, _ in pairs]))
    rows = torch.tensor([i for _, i in pairs])
    width = model.config.hidden_size
    for weight, norm in ((model.model.embed_tokens.weight, SCALE * width**0.5), (model.head_weight, SCALE)):
        frame = torch.linalg.qr(torch.randn(width, features.shape[1]))[0].T
        weight[rows] = norm * features @ frame + 0.02 * torch.randn(len(rows), width)
    return len(rows)
