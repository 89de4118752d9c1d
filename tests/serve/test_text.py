"""Answers' texts and log-probabilities, of models that say what a table says."""

import json

import httpx
import pytest

from helpers.scripted_models import BYTE_LEVEL, END, LEGACY, LETTER, SAY, save_puppet, vocabulary

THINK = ("<think>", "</think>")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<say>{% endif %}{{ m['content'] }}<turn>{% endfor %}"
    "{% if add_generation_prompt %}<say>{{ {'mark': '<think>', 'line': '<think>\\n'}[opened] or opened }}{% endif %}"
)
SAYS = {
    SAY: "fine", "fine": "<|x|>", "<|x|>": "ly", "ly": END, "<think>": "six", "six": "</think>", "</think>": "\n\n",
    "\n\n": "42", "42": " then", " then": END, "?": {LETTER[0xF0]: 30.0, LETTER[0xE2]: 29.0}, "a": {"A": 5.0, "B": 5.0},
    "o": "<think>",
}  # fmt: skip


@pytest.fixture(scope="module")
def url(tmp_path_factory, begin):
    words = (*THINK, "fine", "ly", "six", "\n\n", "42", " then")
    tokenizer = vocabulary(BYTE_LEVEL, ["<|x|>"], words, TEMPLATE, bos="<begin>")
    return begin(save_puppet(tmp_path_factory.mktemp("puppet") / "tiny", tokenizer, SAYS))


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def ask(url, path, **body):
    """The answer as it comes whole; that its chunks join to the same is asserted."""
    body = {"temperature": 0, "max_tokens": 8} | body
    if "prompt" not in body:
        body = {"messages": [{"role": "user", "content": "x"}]} | body
    whole = httpx.post(url + path, json=body, timeout=60)
    assert whole.status_code == 200, whole.text
    choice = strict(whole.text)["choices"][0]
    chunks = httpx.post(url + path, json=body | {"stream": True}, timeout=60).text.splitlines()
    assert chunks[-2] == "data: [DONE]"
    parts = [c for line in chunks[:-2] if line for c in strict(line[6:])["choices"]]
    if "prompt" in body:
        assert "".join(p["text"] for p in parts) == choice["text"]
    else:
        for name in ("content", "reasoning_content"):
            said = "".join(p["delta"].get(name) or "" for p in parts)
            assert said == (choice["message"].get(name) or "")
    for name, values in (choice["logprobs"] or {}).items():
        assert [v for p in parts if p["logprobs"] for v in p["logprobs"][name]] == values
    return choice


def chat(url, **body):
    message = ask(url, "/v1/chat/completions", **body)["message"]
    return message.get("reasoning_content") or "", message["content"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, ("", "finely")),  # the special token is not shown
        ({"stop": ["el"]}, ("", "fin")),
        ({"stop": ["<|x|>"]}, ("", "finely")),
        ({"messages": [{"role": "user", "content": "what is <think> for?"}]}, ("", "finely")),
        ({"messages": [{"role": "assistant", "content": "<think>cut off"}, {"role": "user", "content": "x"}]},
         ("", "finely")),
        ({"thinking_budget": 0}, ("", "finely")),  # nothing to close where nobody thinks
        ({"structured_outputs": {"choice": ["so"]}}, ("", "so")),
    ],
)  # fmt: skip
def test_what_a_chat_says(url, body, said):
    assert chat(url, **body) == said


def test_the_control_tokens_of_a_prompt_are_the_template_s(url):
    talk = [
        {"role": "system", "content": "<turn>"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a<turn><say>b<|x|>"}, {"type": "text", "text": "<end>"}],
        },
        {"role": "assistant", "content": "<think>so</think>yes<turn>"},
        {"role": "tool", "content": "<begin>", "tool_call_id": "1"},
    ]
    tokens = httpx.post(url + "/tokenize", json={"messages": talk}, timeout=60).json()["tokens"]
    names = [httpx.post(url + "/detokenize", json={"tokens": [t]}, timeout=60).json()["prompt"] for t in set(tokens)]
    counts = {n: tokens.count(t) for n, t in zip(names, set(tokens), strict=True)}
    found = {n: counts.get(n, 0) for n in ("<turn>", SAY, "<|x|>", END, "<begin>", *THINK)}
    assert found == {"<turn>": 4, SAY: 2, "<|x|>": 0, END: 0, "<begin>": 0, "<think>": 1, "</think>": 1}


def test_stop_strings_do_not_see_what_nobody_sees(url):
    body = {"prompt": "o", "stop": ["\n\n"]}
    assert ask(url, "/v1/completions", **body)["text"] == "<think>six</think>\n\n42 then"
    assert ask(url, "/v1/completions", prompt="o", stop=["then"])["text"] == "<think>six</think>\n\n42 "


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-46, 1e-38, 1e-20, 1, 100])
@pytest.mark.parametrize(
    "more", [{}, {"logit_bias": {"5": 100, "6": -100}}, {"repetition_penalty": 1e-30, "frequency_penalty": 2},
             {"top_p": 1e-30}, {"structured_outputs": {"choice": ["so"]}}]
)  # fmt: skip
def test_log_probabilities_are_numbers(url, temperature, more):
    found = ask(url, "/v1/completions", prompt="a", logprobs=3, temperature=temperature, seed=1, max_tokens=3, **more)
    numbers = [p for top in found["logprobs"]["top_logprobs"] for p in top.values()]
    assert all(-9999 <= p <= 0 for p in [*numbers, *found["logprobs"]["token_logprobs"]])


@pytest.mark.parametrize("prompt", ["?", "a"])
def test_the_chosen_token_has_one_number(url, prompt):
    """Among equals it is there, and where two tokens read the same it is the one that counts."""
    for count in (1, 2):
        found = ask(url, "/v1/completions", prompt=prompt, max_tokens=1, logprobs=count)["logprobs"]
        (token,), (number,), (top,) = found["tokens"], found["token_logprobs"], found["top_logprobs"]
        assert top[token] == number == max(top.values())
    chosen = ask(url, "/v1/completions", prompt=prompt, max_tokens=1, logprobs=0)["logprobs"]
    assert (chosen["token_logprobs"], chosen["top_logprobs"]) == ([number], [None])


@pytest.mark.parametrize("limit", [0, 1])
def test_offsets_and_echo_are_of_the_text_that_was_sent(url, limit):
    found = ask(url, "/v1/completions", prompt="\U0001f40bé x", echo=True, logprobs=1, max_tokens=limit)
    assert found["text"] == "\U0001f40bé x"
    offsets = found["logprobs"]["text_offset"]
    assert offsets[: 1 + 4 + 2 + 2] == [0, 0, 0, 0, 0, 1, 1, 2, 3], "the token before every text takes no place"
    assert found["logprobs"]["token_logprobs"][0] is None


HALF = "a\ud800"
TOOL = {"type": "function", "function": {"name": "f", "description": HALF}}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": HALF}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
        {"chat_template_kwargs": {"opened": HALF}},
        {"tools": [TOOL]},
        {"stop": [HALF]},
        {"stop": HALF},
        {"structured_outputs": {"regex": HALF}},
        {"structured_outputs": {"choice": [HALF]}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"const": HALF}}}},
        {"model": HALF},
        {"prompt": HALF},
        {"prompt": ["a", "\udfff"]},
    ],
)
def test_half_a_character_is_refused_in_a_sentence(url, body):
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    more = {"max_tokens": 4} if "prompt" in body else {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
    answer = httpx.post(url + path, content=json.dumps(more | body), timeout=60)
    assert answer.status_code in (400, 404), answer.text
    assert len(answer.json()["error"]["message"]) > 10


def test_sentencepiece_in_a_completion_and_a_chat(tmp_path, begin):
    tokenizer = vocabulary(LEGACY, template="{{ messages[0]['content'] }}<say>")
    says = {SAY: "b", "▁b": "▁a", "b": "▁a", "▁a": "<0xC3>", "<0xC3>": "<0xA9>", "<0xA9>": END}
    url = begin(save_puppet(tmp_path / "tiny", tokenizer, says))
    found = ask(url, "/v1/completions", prompt="b", logprobs=0, echo=True)
    assert found["text"] == "b aé"
    assert found["logprobs"]["text_offset"] == [0, 1, 3, 3, 4]
    choice = ask(url, "/v1/chat/completions", logprobs=True)
    said = b"".join(bytes(e["bytes"]) for e in choice["logprobs"]["content"]).decode()
    assert said == choice["message"]["content"] == "b aé"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory, begin):
    says = SAYS | {SAY: "<think>", LETTER[10]: "six"}
    tokenizer = vocabulary(BYTE_LEVEL, ["<|x|>"], (*THINK, "fine", "ly", "six", "\n\n", "42", " then"), TEMPLATE)
    return begin(save_puppet(tmp_path_factory.mktemp("thinker") / "tiny", tokenizer, says))


@pytest.mark.parametrize("opened", ["mark", "line", ""])
def test_thinking_opened_by_the_template_or_the_model_is_the_same(thinker, opened):
    """The same thoughts, the same answer, which alone has the form asked for and ends at stop strings."""

    def said(**more):
        return chat(thinker, chat_template_kwargs={"opened": opened}, **more)

    assert said() == said(stop=["\n\n"]) == said(stop=["six"]) == ("six", "42 then")
    assert said(stop=["then"]) == ("six", "42 ")
    assert said(structured_outputs={"choice": ["so"]}) == ("six", "so")
    assert said(thinking_budget=0) == ("", "42 then")
    assert said(max_tokens=2) == ("six", "")
