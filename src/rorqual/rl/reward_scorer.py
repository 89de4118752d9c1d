"""Rewards for helpfulness by a reward model, where no rule says which answers are right (R1 §2.3.4).

Only the final summary is judged, not the thinking (R1 §2.3.4). Scores are unbounded, so that the reward is
σ((score − mean) / deviation), with both of the answers that the model was trained on: 0.5 for an answer like their
average, 1 at most. It is 0 for a completion without a summary, or one that max_tokens cut off.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rorqual.checkpoint.huggingface import load_reward_model
from rorqual.checkpoint.model_reader import open_release
from rorqual.data.preference_pairs import ConversationEncoder
from rorqual.data.tokenizer import load_tokenizer
from rorqual.judge.extract_answer import final_summary
from rorqual.model.config import ModelConfig
from rorqual.model.reward_model import RewardModel
from rorqual.plan.cost import flops_per_token
from rorqual.recipe import RewardModelSection
from rorqual.rl.envs.environment import Sample

MICRO_TOKENS = 16384  # of a forward pass, padding included


@dataclass
class RewardScorer:
    """A frozen reward model."""

    model: RewardModel
    read: ConversationEncoder
    flops: float = 0.0  # since the start of this process

    @classmethod
    def load(cls, section: RewardModelSection, dtype: torch.dtype, device: torch.device) -> "RewardScorer":
        """Raises UserError for what is no reward model."""
        model = load_reward_model(section.path, dtype, device).eval().requires_grad_(False)
        return cls(model, ConversationEncoder(load_tokenizer(section.path)))

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """In [0, 1], of each sample. Raises UserError as chat templates do."""
        rewards = [0.0] * len(samples)
        judged: list[tuple[int, list[int]]] = []
        for i, sample in enumerate(samples):
            summary = None if sample.truncated else final_summary(sample.text)
            if summary is not None:
                tokens = self.read([*sample.problem.conversation, {"role": "assistant", "content": summary}])
                judged.append((i, tokens[-self.model.config.max_position_embeddings :]))
        judged.sort(key=lambda found: len(found[1]))
        while judged:
            count = max(1, MICRO_TOKENS // len(judged[-1][1]))
            part, judged = judged[-count:], judged[:-count]  # the longest first
            scores = self.scores([tokens for _, tokens in part])
            likely = ((scores - self.model.score_mean) / self.model.score_std).sigmoid()
            for (i, _), value in zip(part, likely, strict=True):
                rewards[i] = float(value)
        return rewards

    @torch.no_grad()
    def scores(self, conversations: Sequence[list[int]]) -> torch.Tensor:
        """Raw scores [B] of conversations, padded on the right, where causal attention does not look."""
        lengths = torch.tensor([len(tokens) for tokens in conversations])
        tokens = torch.zeros(len(conversations), int(lengths.max()), dtype=torch.long)
        for row, own in zip(tokens, conversations, strict=True):
            row[: len(own)] = torch.tensor(own)
        hidden = self.model(tokens.to(self.model.score.weight.device))
        self.flops += tokens.numel() * flops_per_token(self.model.flops_config, tokens.shape[1], training=False)
        return self.model.scores(hidden[torch.arange(len(tokens)), lengths - 1]).cpu()


def check_reward_model(path: str) -> ModelConfig:
    """Its sizes. Raises UserError for what `RewardScorer.load` would refuse, without reading weights."""
    config = open_release(Path(path), RewardModel).outline.config
    load_tokenizer(path)
    return config
