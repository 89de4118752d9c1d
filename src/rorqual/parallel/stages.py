"""Which layers a pipeline stage has, and the part of a model that a rank keeps."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from itertools import accumulate

from torch import Tensor, nn

from rorqual.errors import UserError
from rorqual.model import ModelConfig, Transformer
from rorqual.parallel.schedule import Schedule
from rorqual.plan.cost import active_after_layers, active_by_layer


def split(costs: Sequence[int], stages: int, after: int = 0) -> tuple[range, ...]:
    """The layers of each stage, in order, at least one.

    The most expensive stage costs as little as possible, then the next, and so on; where that leaves a choice, earlier
    stages, which hold more activations, have fewer layers. costs: of each layer; after: of what follows the last.
    """
    sums = [0, *accumulate(costs)]
    # By the number of layers in the stages so far: their costs, highest first, and where each ends.
    best: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {0: ((), ())}
    for stage in range(1, stages + 1):
        more = after if stage == stages else 0
        best = {
            end: min(
                (tuple(sorted((*spent, sums[end] - sums[start] + more), reverse=True)), (*ends, end))
                for start, (spent, ends) in best.items()
                if start < end
            )
            for end in range(stage, len(costs) - (stages - stage) + 1)
        }
    ends = best[len(costs)][1]
    return tuple(map(range, (0, *ends), ends))


def layers_of_stages(config: ModelConfig, schedule: Schedule) -> tuple[range, ...]:
    """Balanced by the parameters that a token is multiplied with. Raises UserError for fewer layers than stages."""
    if config.num_hidden_layers < schedule.stages:
        other = " or choose schedule 1f1b" if schedule.stages > schedule.ranks else ""
        raise UserError(
            f"parallel.pipeline = {schedule.ranks}: schedule {schedule.name} needs {schedule.stages} stages of at "
            f"least one layer, and the model has {config.num_hidden_layers} layers; lower parallel.pipeline{other}"
        )
    return split(active_by_layer(config), schedule.stages, active_after_layers(config))


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
