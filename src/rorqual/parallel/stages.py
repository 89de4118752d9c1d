"""The part of a model that a pipeline rank keeps."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager

from torch import Tensor, nn

from rorqual.model import Transformer


def keep(model: Transformer, layers: Iterable[int], first: bool, last: bool) -> None:
    """Replace all but these layers by modules without parameters; what stays keeps its names.

    first: keep the embedding; last: keep norm, head (a tied embedding) and multi-token modules.
    """
    config, decoder = model.config, model.model
    kept = set(layers) | (set(range(config.num_hidden_layers, len(decoder.layers))) if last else set())
    for index in range(len(decoder.layers)):
        if index not in kept:
            decoder.layers[index] = nn.Identity()
    if not (first or (last and config.tie_word_embeddings)):
        setattr(decoder, "embed_tokens", nn.Identity())  # noqa: B010 -- of another type
    if not last:
        setattr(decoder, "norm", nn.Identity())  # noqa: B010
        if not config.tie_word_embeddings:
            setattr(model, "lm_head", nn.Identity())  # noqa: B010


@contextmanager
def looked_up(embedding: nn.Module, rows: Iterable[Tensor]) -> Generator[None]:
    """Context in which the embedding returns `rows`, one a call, whatever its tokens."""
    found = iter(rows)
    vars(embedding)["forward"] = lambda _tokens: next(found)
    try:
        yield
    finally:
        del vars(embedding)["forward"]
