"""Fourier-feature initialisation of number tokens, for arithmetic.

With one token per integer, a small model must otherwise learn from examples that 17 is next to 18 and ends like 27.
Here the embedding and the LM-head row of n are initialised from sines and cosines of n at several periods, the features
that networks trained on addition learn (Nanda et al. 2023, arXiv 2301.05217, §4; Zhou et al. 2024, 2406.03445, who also
initialise with them). They are trained like all other weights.
"""

import math

import torch
from torch import Tensor

from rorqual.model import Transformer
from rorqual.tokenizer_protocol import Tokenizer

PERIODS = (2, 4, 5, 8, 10, 16, 20, 25, 32, 50, 64, 100, 128, 200, 256, 400, 800)
SCALE = 0.3  # norm of a head row; an embedding has √hidden times that


def number_features(numbers: Tensor) -> Tensor:
    """numbers [n] → unit vectors [n, 2·periods + 1]: cosines, sines, and the value itself."""
    angles = 2 * math.pi * numbers[:, None] / torch.tensor(PERIODS)
    features = torch.cat([angles.cos(), angles.sin(), numbers[:, None] / max(PERIODS)], dim=1)
    return features / features.norm(dim=1, keepdim=True)


@torch.no_grad()
def start_numbers(model: Transformer, tokenizer: Tokenizer) -> int:
    """Set the embedding and head rows of all integer tokens, in a random orthonormal frame; returns their count.

    The hidden size must be at least 2·periods + 1 = 35.
    """
    pairs = [(int(token), i) for token, i in tokenizer.get_vocab().items() if token.isascii() and token.isdigit()]
    pairs = sorted((n, i) for n, i in pairs if tokenizer.decode([i]) == str(n))  # not 007
    features = number_features(torch.tensor([float(n) for n, _ in pairs]))
    rows = torch.tensor([i for _, i in pairs])
    width = model.config.hidden_size
    for weight, norm in ((model.model.embed_tokens.weight, SCALE * width**0.5), (model.head_weight, SCALE)):
        basis = torch.linalg.qr(torch.randn(width, features.shape[1]))[0].T
        weight[rows] = norm * features @ basis + 0.02 * torch.randn(len(rows), width)
    return len(rows)
