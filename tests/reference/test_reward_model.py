"""Scores of reward models are those of transformers, read from the directory that we wrote; random weights, fp32."""

import json

import pytest
import torch

from helpers.reference_models import CONFIGS, build
from rorqual.checkpoint.huggingface import load_model, load_reward_model, save_model
from rorqual.errors import UserError
from rorqual.model.reward_model import RewardModel

transformers = pytest.importorskip("transformers")

CLASSES = {
    "llama": "LlamaForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "v3": "DeepseekV3ForSequenceClassification",
}
PADDING = 100  # a token that no conversation has


@pytest.fixture(params=CLASSES)
def saved(request, tmp_path):
    model = RewardModel.of(build(CONFIGS[request.param], pad_token_id=PADDING))
    model.score_mean, model.score_std = 0.25, 2.0
    save_model(model, tmp_path / "reward")
    return request.param, model.eval(), tmp_path / "reward"


def test_scores(saved):
    kind, model, path = saved
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert type(theirs).__name__ == CLASSES[kind]
    assert not any(report[name] for name in ("unexpected_keys", "mismatched_keys", "missing_keys"))
    torch.manual_seed(1)
    tokens = torch.randint(1, PADDING, (3, 12))
    lengths = torch.tensor([12, 7, 3])
    tokens[torch.arange(12) >= lengths[:, None]] = PADDING
    with torch.no_grad():
        expected = theirs.eval()(tokens, attention_mask=(tokens != PADDING).long()).logits[:, 0]
        found = model.scores(model(tokens)[torch.arange(3), lengths - 1])
    assert expected.std() > 0.1  # the comparison would be empty otherwise
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_written_reward_model_is_read_again(saved):
    _, model, path = saved
    again = load_reward_model(path)
    assert again.score.weight.shape == (1, model.config.hidden_size)
    assert (again.score_mean, again.score_std) == (0.25, 2.0)
    theirs = again.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in model.state_dict().items())
    with pytest.raises(UserError, match=r"reward is a reward model \(architectures in its config.json\); give a lang"):
        load_model(path)


def test_what_is_no_reward_model_is_refused(saved, tmp_path):
    _, _, path = saved
    save_model(build(CONFIGS["llama"]), tmp_path / "language")
    with pytest.raises(UserError, match=r"language is a language model .*; give a reward model"):
        load_reward_model(tmp_path / "language")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"score_std": 0}))
    with pytest.raises(UserError, match=r"score_std = 0 must be a number"):
        load_reward_model(path)
