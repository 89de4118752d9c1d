"""Where a model's weights can go."""

import pytest
import torch

from rorqual.engine.load import open_model
from rorqual.errors import UserError


def test_a_gpu_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no GPU here"):
        open_model(tmp_path, device="cuda")


def test_packed_weights_are_for_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="packed weights are for a CPU"):
        open_model(tmp_path / "model.gguf", device="cuda")
