"""A reward model: the network with a scalar head instead of the language head (InstructGPT §3.5; R1 §2.3.4).

The score of a conversation is read at its last token. The layout is that of transformers'
`…ForSequenceClassification` with one label, whose weights are `model.*` and `score.weight`.

B batch, T tokens, D hidden.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.model.config import ModelConfig
from rorqual.model.layers import Linear
from rorqual.model.model_directory import model_directory, read_json
from rorqual.model.transformer import Transformer
from rorqual.shapes import Float

LANGUAGE, REWARD = "ForCausalLM", "ForSequenceClassification"  # ends of an architecture's name in config.json


class RewardModel(Transformer):
    """`score_mean`, `score_std`: of the scores of the pairs that it was trained on, kept in config.json."""

    def __init__(self, config: ModelConfig) -> None:
        # There is no language head, nor what predicts further tokens.
        super().__init__(config.replace(tie_word_embeddings=True, num_nextn_predict_layers=0))
        self.score = Linear(config.hidden_size, 1, bias=False)
        if not self.score.weight.is_meta:
            _start(self.score.weight)
        self.score_mean, self.score_std = 0.0, 1.0

    @classmethod
    def of(cls, model: Transformer) -> "RewardModel":
        """A language model's network, which it takes over, with a random head."""
        with torch.device("meta"):
            found = cls(model.config)
        found.released = model.released
        found.model = model.model
        found.model.layers = nn.ModuleList(model.layers)
        found.score.weight = nn.Parameter(_start(torch.empty(1, model.config.hidden_size)))
        return found

    @property
    def flops_config(self) -> ModelConfig:
        return self.config.replace(vocab_size=1)

    def scores(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
        """FP32 scores, from hidden states after the last norm."""
        return hidden.float() @ self.score.weight[0].float()

    def config_dict(self) -> dict[str, Any]:
        found = super().config_dict()
        found["architectures"] = [name.replace(LANGUAGE, REWARD) for name in found["architectures"]]
        labels: dict[str, Any] = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        return found | labels | {"score_mean": self.score_mean, "score_std": self.score_std}


@torch.no_grad()
def _start(weight: Tensor) -> Tensor:
    """Normal with variance 1/(D + 1), so that first scores are about 1 apart (Stiennon et al. 2020, appendix B.1)."""
    return weight.normal_(std=(weight.shape[1] + 1) ** -0.5)


def is_reward_model(path: str | Path) -> bool:
    """Whether a directory's config.json names a reward model. Raises UserError where there is none."""
    names: list[object] | None = read_json(model_directory(path) / "config.json").get("architectures")
    return isinstance(names, list) and any(str(name).endswith(REWARD) for name in names)
