"""Parity with transformers, an independent implementation of the same networks; random weights, fp32."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from rorqual import load_model, save_model
from rorqual.engine import Engine, SamplingParams
from rorqual.kernels.cross_entropy import linear_cross_entropy

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


@pytest.fixture(scope="module")
def saved(ours, tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "model"
    save_model(ours, path)
    return path


@pytest.fixture(scope="module")
def theirs(saved):
    """transformers' network, read from the directory that we wrote."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert all("shared_experts" in name for name in report["missing_keys"])  # width 0 where we have none
    return model.eval()


def test_logits(ours, theirs, tokens):
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours.logits(tokens)
    assert expected.std() > 0.1  # the comparison would be empty otherwise
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def continuation(theirs, prompt):
    """Their greedy continuation of prompt [B, T] by 12 tokens."""
    all_seen = torch.ones_like(prompt)
    return theirs.generate(prompt, attention_mask=all_seen, max_new_tokens=12, do_sample=False, pad_token_id=0)


def test_greedy_continuation(ours, theirs, tokens):
    found = prompt = tokens[:, :8]
    expected = continuation(theirs, prompt)
    with torch.no_grad():
        for _ in range(12):
            found = torch.cat([found, ours.logits(found)[:, -1:].argmax(-1)], dim=1)
    assert found.tolist() == expected.tolist()


def test_greedy_continuation_by_the_engine(ours, theirs, tokens):
    prompts = [tokens[:1, :8], tokens[1:, :3], tokens[1:, :11]]  # of unequal lengths, two at a time
    params = SamplingParams(temperature=0, max_tokens=12)
    found = Engine(ours, max_num_seqs=2).generate([p[0].tolist() for p in prompts], params)
    for prompt, completion in zip(prompts, found, strict=True):
        expected = continuation(theirs, prompt)
        assert completion.tokens == expected[0, prompt.shape[1] :].tolist()


def test_their_directory_loads_here(ours, theirs, tokens, tmp_path):
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), ours.logits(tokens), atol=0, rtol=0)


def test_gradients_of_one_step(ours, theirs, tokens):
    ours.zero_grad()
    theirs.zero_grad()
    targets = tokens[:, 1:].flatten()
    logits = theirs(tokens).logits[:, :-1].flatten(0, 1)
    cross_entropy(logits, targets).backward()
    hidden = ours(tokens)[:, :-1].flatten(0, 1)
    share = torch.full(targets.shape, 1 / len(targets))
    linear_cross_entropy(hidden, ours.head_weight, targets, share).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.numel()}
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-3, name
