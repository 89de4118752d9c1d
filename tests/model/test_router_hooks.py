import torch

from helpers.small_configs import LATENT
from rorqual.model import Transformer
from rorqual.model.router_hooks import NOT_RECORDED, Replay, choices_of, replayed, routers

TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


def test_a_replay_takes_the_recorded_experts_where_there_are_some():
    torch.manual_seed(0)
    model, counts = Transformer(LATENT), Replay()
    with torch.no_grad(), choices_of(model) as chosen:
        model(TOKENS)
    own = torch.stack(chosen, 1)
    recorded = (own + 1) % 4  # of K = 2 experts, at least one is another than the router's
    recorded[3] = NOT_RECORDED
    with replayed(model, recorded, counts), choices_of(model) as chosen:
        states = model(TOKENS)
    again = torch.stack(chosen, 1)
    known = torch.tensor([True, True, True, False, True])
    assert torch.equal(again[known], recorded[known])
    assert counts.replayed == 8
    assert 0 < counts.differ <= 8
    assert not torch.allclose(states, model(TOKENS))
    assert not any(router._forward_hooks for router in routers(model))


def test_gate_weights_are_the_trained_routers_own():
    """Of the recorded experts' scores, so that the router learns from them."""
    torch.manual_seed(0)
    model = Transformer(LATENT)
    router, x = routers(model)[0], torch.randn(3, 32)
    recorded = torch.tensor([[0, 1], [2, 3], [1, 3]])
    with replayed(model, recorded.unsqueeze(1).expand(3, 2, 2), Replay()):
        weights, chosen, _ = router(x)
    scores = (x @ router.weight.T).sigmoid()
    expected = torch.stack([scores[i, row] / scores[i, row].sum() for i, row in enumerate(recorded)])
    assert torch.equal(chosen, recorded)
    assert torch.allclose(weights, expected, atol=1e-6)
    weights[:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0
