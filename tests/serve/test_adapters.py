"""Adapters in the API: a request's `model` says which."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from helpers.adapters import save_random_adapter
from helpers.servers import Server
from rorqual.engine import Engine, SamplingParams


@pytest.fixture(scope="module")
def paths(directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_random_adapter(directory, folder / name, seed) for name, seed in {"poet": 1, "clerk": 2}.items()}


@pytest.fixture(scope="module")
def adapted(directory, paths):
    running = Server(directory, engine={"adapters": paths})
    yield running
    assert running.settled() == 0
    running.stop()


def test_concurrent_requests_are_answered_as_by_merged_models(directory, paths, adapted):
    prompts = ["what is 12", "or the sum", "and 7"]

    def ask(asked):
        name, prompt = asked
        found = adapted.client().completions.create(model=name, prompt=prompt, max_tokens=12, temperature=0)
        assert found.model == name
        return found.choices[0].text

    asked = [(name, prompt) for prompt in prompts for name in ("tiny", "poet", "clerk")]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = dict(zip(asked, pool.map(ask, asked), strict=True))
    for name in ("tiny", "poet", "clerk"):
        engine = Engine(directory, adapter=paths.get(name))
        merged = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12))
        assert [answers[name, prompt] for prompt in prompts] == [found.text for found in merged]
    assert len(set(answers.values())) == len(asked)


def test_they_are_listed_and_others_are_not_found(adapted):
    client = adapted.client()
    assert [card.id for card in client.models.list()] == ["tiny", "clerk", "poet"]
    assert client.models.retrieve("poet").id == "poet"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny', 'clerk', 'poet'"):
        client.completions.create(model="cook", prompt="x")


def test_a_conversation_and_a_scored_text(adapted):
    client = adapted.client()
    messages = [{"role": "user", "content": "what is 12 and 7"}]
    texts, scores = set(), set()
    for name in ("tiny", "poet"):
        found = client.chat.completions.create(model=name, messages=messages, max_tokens=12, temperature=0)
        assert found.model == name
        texts.add(found.choices[0].message.reasoning_content or found.choices[0].message.content)
        scored = client.completions.create(model=name, prompt="what is 12", max_tokens=0, echo=True, logprobs=0)
        scores.add(scored.choices[0].logprobs.token_logprobs[-1])
    assert len(texts) == len(scores) == 2
