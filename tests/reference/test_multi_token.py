"""Multi-token modules against those of transformers, read from the directory that we wrote."""

import pytest
import torch

from helpers.reference_models import CONFIGS, build
from rorqual import load_model, save_model

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("depth", [1, 2])
def test_states_of_every_depth(depth, tokens, tmp_path):
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    ours = build(CONFIGS["v3"], num_nextn_predict_layers=depth)
    save_model(ours, tmp_path / "model")
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3.*", r"model\.layers\.4.*"]  # the release's is 61
    theirs = MtpModel.from_pretrained(main).eval()
    with torch.no_grad():
        hidden = ours(tokens)
        found = ours.mtp_hidden_states(hidden, tokens)
        state = main.model(tokens).last_hidden_state
        for k in range(depth):
            # depth k has inputs for all but the last k+1 positions
            state = state[:, : tokens.shape[1] - k - 1]
            positions = torch.arange(state.shape[1])[None]
            cache = MtpCache(config=main.config.get_mtp_config())
            state = theirs.forward_layer(k, state, positions, cache, input_ids=tokens[:, k + 1 :])
            torch.testing.assert_close(found[k][:, : state.shape[1]], state, atol=1e-4, rtol=0)


def test_modules_come_back_from_disk(tokens, tmp_path):
    ours = build(CONFIGS["v3-yarn"], num_nextn_predict_layers=2)
    save_model(ours, tmp_path / "model")
    again = load_model(tmp_path / "model")
    with torch.no_grad():
        expected, found = (m.mtp_hidden_states(m(tokens), tokens) for m in (ours, again))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
