"""The loss of reward models, against its formula on each conversation by itself."""

import numpy as np
import pytest
import torch

from rorqual.data.preference_pairs import PairDataset
from rorqual.model.reward_model import RewardModel
from rorqual.recipe import OptimizerSection, ScheduleSection
from rorqual.train.preference import PreferenceObjective, pair_scores
from rorqual.train.trainer import Trainer
from rorqual.train.training_run import split

PAIRS = [([1, 2, 3, 4, 5], [1, 2, 9]), ([7, 8], [7, 9, 9, 9]), ([11, 12, 13], [11, 12, 14])]


@pytest.fixture
def model(make_model):
    return RewardModel.of(make_model(num_nextn_predict_layers=1))


def alone(model, tokens):
    return model.scores(model(torch.tensor([tokens]))[0, -1])


def test_losses_and_gradients_are_those_of_single_conversations(model):
    assert "lm_head.weight" not in model.state_dict()
    assert len(model.model.layers) == model.config.num_hidden_layers  # without the multi-token module
    batch = PairDataset(PAIRS, 0).batch(np.arange(3))
    margins = torch.stack([alone(model, better) - alone(model, worse) for better, worse in PAIRS])
    expected = torch.log1p(torch.exp(-margins)).mean()
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    objective = PreferenceObjective(model, [1e-9], 0.0, 0.0, sequences=3)
    loss = objective.losses(model(batch.inputs, batch.positions, batch.attention_mask), batch, [])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert objective.sums[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert wanted["score.weight"].abs().max() > 0
    for name, p in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name], atol=1e-6, rtol=1e-4)


def test_scores_of_a_batch(model):
    batch = PairDataset(PAIRS, 0).batch(np.arange(3))
    with torch.no_grad():
        better, worse = pair_scores(model, model(batch.inputs, batch.positions, batch.attention_mask), batch)
        expected = [[float(alone(model, tokens)) for tokens in side] for side in zip(*PAIRS, strict=True)]
    torch.testing.assert_close(better, torch.tensor(expected[0]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(worse, torch.tensor(expected[1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_micro_batches_add_up_and_training_separates_the_pairs(make_model, name):
    def trained(size):
        made = RewardModel.of(make_model())
        trainer = Trainer(
            made, OptimizerSection(name=name, lr=3e-3), ScheduleSection(name="constant"), objective=PreferenceObjective
        )
        batch = PairDataset(PAIRS, 0).batch(np.arange(3))
        return [trainer.step(split(batch, size), 0.5).loss for _ in range(12)], trainer

    whole, _ = trained(None)
    parts, trainer = trained(1)
    assert parts == pytest.approx(whole, rel=1e-3)
    assert whole[-1] < 0.5 * whole[0]
    assert "score.weight" not in trainer.optimizer.muon.momentum  # a head is AdamW's
