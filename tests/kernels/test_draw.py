import pytest
import torch

from rorqual.kernels.draw import draw, draw_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [3, 256, 700])
def test_words_and_logprobs_match_the_reference(dtype, words):
    torch.manual_seed(0)
    logits, uniform = (3 * torch.randn(500, words)).to(dtype), torch.rand(500)
    found, logprob = draw(logits, 0.7, uniform)
    right, expected = draw_reference(logits, 0.7, uniform)
    assert (found == right).float().mean() > 0.99  # a number within rounding of a boundary may fall to either side
    same = found == right
    torch.testing.assert_close(logprob[same], expected[same], rtol=1e-4, atol=1e-5)


def test_the_ends_of_the_range():
    logits = torch.full((2, 600), -50.0)
    logits[:, 0], logits[:, 599] = 0.0, 0.0
    assert draw(logits, 1.0, torch.tensor([0.0, 1 - 2**-24]))[0].tolist() == [0, 599]


def test_shares_are_the_probabilities():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(10_000, 4)
    words, _ = draw(logits, 1.0, (torch.arange(10_000) + 0.5) / 10_000)
    assert torch.bincount(words, minlength=4).tolist() == pytest.approx([1000, 2000, 3000, 4000], abs=2)
