"""Which parameters are stored in the compute dtype, and which are hidden matrices."""

from torch import Tensor


def is_converted(name: str, parameter: Tensor) -> bool:
    """Whether it is stored in the compute dtype: embeddings, linears with biases, experts; not router and norms."""
    return (parameter.ndim >= 2 and not name.endswith("mlp.gate.weight")) or name.endswith(".bias")


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates it: matrices other than embedding, heads and router."""
    outside = "embed_tokens" in name or name.startswith(("lm_head", "score.")) or name.endswith("mlp.gate.weight")
    return parameter.ndim >= 2 and not outside
