import pytest
import torch

from rorqual.kernels.sample import SamplingFilter, sample, sample_reference


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [3, 256, 700, 5000])
@pytest.mark.parametrize("spread", [0.01, 3.0])
@pytest.mark.parametrize(
    "cut",
    [
        SamplingFilter(0.7), SamplingFilter(0.6, top_p=0.95), SamplingFilter(1.0, top_p=0.9),
        SamplingFilter(1.0, top_p=0.01), SamplingFilter(2.0, top_p=0.999), SamplingFilter(1.0, top_k=1),
        SamplingFilter(1.0, top_k=40), SamplingFilter(0.7, top_k=10_000), SamplingFilter(1.0, min_p=0.1),
        SamplingFilter(0.5, min_p=0.9), SamplingFilter(1.0, top_p=0.5, top_k=20),
        SamplingFilter(0.7, top_p=0.9, min_p=0.05), SamplingFilter(1.0, 0.95, 30, 0.02),
    ],
)  # fmt: skip
def test_words_and_logprobs_match_the_reference(dtype, words, spread, cut):
    torch.manual_seed(0)
    logits, uniform = (spread * torch.randn(300, words)).to(dtype), torch.rand(300)
    found, logprob = sample(logits, cut, uniform)
    right, expected = sample_reference(logits, cut, uniform)
    assert (found == right).float().mean() > 0.99  # a number within rounding of a boundary may fall to either side
    same = found == right
    torch.testing.assert_close(logprob[same], expected[same], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [3, 256, 700])
def test_without_temperature_the_first_of_the_most_probable(dtype, words):
    torch.manual_seed(0)
    logits, uniform = torch.randn(50, words).to(dtype), torch.rand(50)
    found, logprob = sample(logits, SamplingFilter(0.0), uniform)
    right, expected = sample_reference(logits, SamplingFilter(0.0), uniform)
    assert found.tolist() == right.tolist()
    torch.testing.assert_close(logprob, expected, rtol=1e-4, atol=1e-5)
    assert sample(torch.zeros(1, words, dtype=dtype), SamplingFilter(0.0), uniform[:1])[0].tolist() == [0]


def test_the_ends_of_the_range():
    logits = torch.full((2, 600), -50.0)
    logits[:, 0], logits[:, 599] = 0.0, 0.0
    assert sample(logits, SamplingFilter(1.0), torch.tensor([0.0, 1 - 2**-24]))[0].tolist() == [0, 599]


@pytest.mark.parametrize(
    "cut",
    [
        SamplingFilter(1.0),
        SamplingFilter(0.6, top_p=0.95),
        SamplingFilter(1.0, top_k=40),
        SamplingFilter(1.0, min_p=0.1),
        SamplingFilter(0.0),
    ],
)
def test_what_is_forbidden_is_never_drawn(cut):
    logits = torch.full((3, 1500), -torch.inf)
    logits[:, 300], logits[:, 301], logits[:, 900] = 0.0, 0.1, 0.2
    words, logprobs = sample(logits, cut, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert set(words.tolist()) <= {300, 301, 900}
    assert logprobs.min() > -1.3


@pytest.mark.parametrize("way", [sample, sample_reference])
def test_the_smallest_temperature_is_nearly_none(way):
    logits = torch.randn(20, 700, generator=torch.Generator().manual_seed(0))
    for cut in (SamplingFilter(1e-45), SamplingFilter(1e-45, top_p=0.9), SamplingFilter(1e-30, top_k=3)):
        assert torch.equal(way(logits, cut, torch.rand(20))[0], logits.argmax(-1))


def test_shares_are_the_probabilities():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(10_000, 4)
    words, _ = sample(logits, SamplingFilter(1.0), (torch.arange(10_000) + 0.5) / 10_000)
    assert torch.bincount(words, minlength=4).tolist() == pytest.approx([1000, 2000, 3000, 4000], abs=2)


def test_the_improbable_words_of_a_large_vocabulary_are_not_lost():
    """One sure word and 150 000 whose share is 2e-8 each: a tail of 0.3 %, which FP32 would not add to 1."""
    shares = torch.full((1, 150_000), 2e-8)
    shares[0, 7] = 1.0
    uniform = torch.tensor([0.5, 0.9975, 0.9985, 0.9995])
    exact = shares.double().cumsum(1) / shares.double().sum()
    expected = torch.searchsorted(exact[0], uniform.double())
    found, _ = sample(shares.log().expand(4, -1), SamplingFilter(1.0), uniform)
    assert found[0] == 7
    assert (found - expected).abs().max() < 200  # of 150 000: the numbers themselves are rounded


def test_a_whole_number_as_temperature():
    logits = torch.randn(4, 9)
    assert torch.equal(
        sample(logits, SamplingFilter(1), torch.rand(4) * 0)[0],
        sample(logits, SamplingFilter(1.0), torch.rand(4) * 0)[0],
    )
