"""Several adapters served at a time answer as the models they make merged would alone."""

import pytest
import torch

from helpers.adapters import save_random_adapter
from helpers.small_configs import GROUPED, LATENT, greedy_by_full_passes
from rorqual.adapters.lora import merge
from rorqual.adapters.peft_files import read_adapter
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.model import Transformer
from rorqual.precision.quantize import convert

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [1, 2, 3], [9, 9, 4, 1, 7]]
ATTENTION = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(params=["grouped", "latent", "latent attention by rows"])
def served(request, tmp_path):
    """A model's directory, and those of two adapters."""
    torch.manual_seed(0)
    save_model(Transformer(GROUPED if request.param == "grouped" else LATENT), tmp_path / "base")
    targets = ATTENTION if request.param == "latent attention by rows" else "all"
    names = {"a": 1, "b": 2}
    return tmp_path / "base", {
        n: save_random_adapter(tmp_path / "base", tmp_path / n, s, targets) for n, s in names.items()
    }


def merged(base, path=None):
    model = load_model(base)
    if path is not None:
        merge(model, read_adapter(path).updates)
    return model


@pytest.mark.parametrize("speculative", [None, "ngram"])
def test_mixed_in_a_batch_each_answers_as_if_merged(served, speculative):
    base, paths = served
    engine = Engine(load_model(base), adapters=paths, speculative=speculative, max_prefill_tokens=16)
    assert engine.adapters.by_rows is not updates_up_projections(paths)
    asked = [(name, prompt) for prompt in PROMPTS for name in (None, "a", "b")]
    requests = [
        engine.submit(p, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, adapter=name))
        for name, p in asked
    ]
    together = 0
    while not engine.idle:
        engine.step()
        together = max(together, engine.status().running)
    assert together == len(asked)
    answers = set()
    for (name, prompt), request in zip(asked, requests, strict=True):
        expected, _ = greedy_by_full_passes(merged(base, paths.get(name)), prompt, 12, to_the_end=True)
        assert request.sequences[0].tokens == expected, (name, prompt)
        answers.add((len(prompt), *expected))
    assert len(answers) == len(asked)  # every adapter answers in its own way


def updates_up_projections(paths):
    return any("kv_b_proj" in linear for path in paths.values() for linear in read_adapter(path).updates)


def test_a_prefix_is_shared_within_an_adapter_alone(served):
    base, paths = served
    engine = Engine(load_model(base), adapters=paths, prefix_cache=True)
    prompt = PROMPTS[0]

    def ask(name):
        (found,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, adapter=name))
        return found

    for name in (None, "a", "b"):
        first = ask(name)
        assert first.cached_tokens == 0
        again = ask(name)
        assert again.cached_tokens == 16
        expected, _ = greedy_by_full_passes(merged(base, paths.get(name)), prompt, 8, to_the_end=True)
        assert first.tokens == again.tokens == expected


def test_scores_are_the_adapters(served):
    base, paths = served
    engine = Engine(load_model(base), adapters=paths)
    tokens = PROMPTS[0]
    for name in (None, "b"):
        request = engine.score(tokens, 0, name)
        while not request.done:
            engine.step()
        with torch.no_grad():
            logp = merged(base, paths.get(name)).logits(torch.tensor([tokens]))[0].log_softmax(-1)
        expected = [float(logp[i, t]) for i, t in enumerate(tokens[1:])]
        assert request.prompt_logprobs.logprobs[1:] == pytest.approx(expected, abs=1e-4)


def test_what_an_engine_refuses(served, tmp_path):
    base, paths = served
    with pytest.raises(UserError, match=r"adapter = 'c': this engine serves a, b"):
        Engine(load_model(base), adapters=paths).generate([[1]], SamplingParams(adapter="c"))
    with pytest.raises(UserError, match=r"adapter = 'c': this engine serves none"):
        Engine(load_model(base)).submit([1], SamplingParams(adapter="c"))
    with pytest.raises(UserError, match="quantised weights and adapters do not go together"):
        Engine(convert(load_model(base), "int8"), adapters=paths)
    torch.manual_seed(0)
    save_model(Transformer(GROUPED.replace(hidden_size=64)), tmp_path / "wide")
    with pytest.raises(UserError, match=r"adapter a: the adapter updates .*; give the model it was made for"):
        Engine(load_model(tmp_path / "wide"), adapters=paths)
