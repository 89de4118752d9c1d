"""What a reward model minimises, and its scores of pairs.

B pairs of a batch, T tokens, D hidden.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from rorqual.data.loader import Batch
from rorqual.model.moe import Routing
from rorqual.model.reward_model import RewardModel
from rorqual.shapes import Float
from rorqual.train.objective import Objective


class PreferenceObjective(Objective):
    """−log σ(r_chosen − r_rejected), mean over the step's pairs (Bradley-Terry; InstructGPT eq. 1; R1 §2.3.4)."""

    def losses(self, hidden: Float[Tensor, "B T D"], batch: Batch, routing: list[Routing]) -> Tensor:
        assert isinstance(self.model, RewardModel)
        margins = (batch.weights * self.model.scores(hidden)).sum(1)  # the others of its tokens weigh 0
        loss = -logsigmoid(margins).sum() / self.sequences
        self.sums[0] += loss.detach().cpu()
        return self._checked(loss)


def pair_scores(model: RewardModel, hidden: Float[Tensor, "B T D"], batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores [B] of the better answers, and of the worse ones."""
    scores = model.scores(hidden)
    return (scores * (batch.weights > 0)).sum(1), (scores * (batch.weights < 0)).sum(1)
