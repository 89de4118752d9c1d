"""How a server samples: as the request says, else as the model's release, else our way."""

import json
import shutil

import pytest

from rorqual.engine import SamplingParams
from rorqual.engine.generation_defaults import default_sampling
from rorqual.model.release_settings import SUPPRESS_BIAS
from rorqual.serve.protocol import ChatRequest, CompletionRequest

RELEASE = {
    "do_sample": False, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.5,
    "frequency_penalty": 0.25, "max_new_tokens": 7, "stop_strings": ["zz"], "suppress_tokens": [9],
}  # fmt: skip
FROM_RELEASE = {
    "temperature": 0, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.5,
    "frequency_penalty": 0.25, "stop": ("zz",), "logit_bias": ((9, SUPPRESS_BIAS),),
}  # fmt: skip


@pytest.fixture(scope="module")
def released(directory, tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "tiny"
    shutil.copytree(directory, path)
    (path / "generation_config.json").write_text(json.dumps(RELEASE))
    return path


def params(released, **body):
    asked = ChatRequest(messages=[{"role": "user", "content": "?"}], **body)
    return asked.params(default_sampling(released), 7, 0, None)


def test_what_a_request_leaves_out_is_the_releases(released):
    assert params(released) == SamplingParams(**FROM_RELEASE, max_tokens=7)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"top_p": 1.0}, {"top_p": 1.0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"min_p": 0.0}, {"min_p": 0.0}),
        ({"repetition_penalty": 1.0}, {"repetition_penalty": 1.0}),
        ({"presence_penalty": 0.0}, {"presence_penalty": 0.0}),
        ({"frequency_penalty": 0.0}, {"frequency_penalty": 0.0}),
        ({"stop": []}, {"stop": ()}),
        ({"stop": "b"}, {"stop": ("b",)}),
        ({"logit_bias": {"8": 1.0}}, {"logit_bias": ((9, SUPPRESS_BIAS), (8, 1.0))}),
        ({"logit_bias": {"9": 1.0}}, {"logit_bias": ((9, 1.0),)}),
    ],
)
def test_a_request_comes_before_the_release(released, body, expected):
    assert params(released, **body) == SamplingParams(**FROM_RELEASE | expected, max_tokens=7)


def test_length_of_an_answer(start, released):
    """Of a chat and of a text: the request's, else the release's."""
    client = start(directory=released).client()
    plain = {"model": "tiny", "extra_body": {"ignore_eos": True, "stop": [], "temperature": 1.0}}
    messages = [{"role": "user", "content": "what is 1 and 2?"}]
    for asked, made in (({}, 7), ({"max_tokens": 9}, 9)):
        chat = client.chat.completions.create(messages=messages, **plain, **asked)
        text = client.completions.create(prompt="what", **plain, **asked)
        assert (chat.usage.completion_tokens, text.usage.completion_tokens) == (made, made)


def test_openais_length_of_a_text_where_the_release_says_none(server):
    assert CompletionRequest(prompt="what").max_tokens == 16
    found = server.client().completions.create(model="tiny", prompt="what", extra_body={"ignore_eos": True})
    assert found.usage.completion_tokens == 16
