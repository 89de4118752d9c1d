import copy
import gzip
import json
import tracemalloc

import pyarrow
import pytest
from pyarrow import parquet

from helpers.documents import write_jsonl
from rorqual.data.chat_dataset import encode_sample, read_chat
from rorqual.data.chat_messages import read_messages, read_tools
from rorqual.data.chat_template import ChatTemplate
from rorqual.data.tokenizer import train_tokenizer
from rorqual.errors import UserError
from rorqual.recipe import TokenizerSection

CHATML = """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# DeepSeek-R1's habits: thinking of answers is left out, and the prompt opens the next one.
R1 = """\
{%- for m in messages %}
{%- if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}
{%- else %}{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>OPEN' }}{% endif %}"""


def turn(role, content):
    return {"role": role, "content": content}


CONVERSATION = [
    turn("system", "Be brief."),
    turn("user", "What is 12 + 30?"),
    turn("assistant", "<think>12 + 30</think> 42"),
    turn("user", "And twice that?"),
    turn("assistant", "84"),
]


def with_template(tokenizer, template, eos=None):
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    if eos:
        own.add_special_tokens({"eos_token": eos})
    return own


def with_loss(sample, tokenizer):
    """The stretches of text that bear loss."""
    out, previous = [], 0
    for token, mark in zip(*sample, strict=True):
        if mark:
            out = [*out[:-1], out[-1] + [token]] if previous else [*out, [token]]
        previous = mark
    return [tokenizer.decode(tokens) for tokens in out]


def test_loss_is_on_assistant_turns(tokenizer):
    sample = encode_sample({"messages": CONVERSATION}, tokenizer)
    assert with_loss(sample, tokenizer) == ["<think>12 + 30</think> 42<|endoftext|>", "84<|endoftext|>"]
    assert tokenizer.decode(sample[0]) == tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    prompt = tokenizer.apply_chat_template(CONVERSATION[:2], tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(prompt)
    assert sample[0][: len(ids)] == ids
    assert not any(sample[1][: len(ids)])
    assert sample[1][len(ids)]


@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:], CONVERSATION[1:3]])
def test_template_without_markers_and_with_line_ends(tokenizer, messages):
    chatml = with_template(tokenizer, CHATML, eos="<|im_end|>")
    sample = encode_sample({"messages": messages}, chatml)
    answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert with_loss(sample, chatml) == answers
    assert chatml.decode(sample[0]) == chatml.apply_chat_template(messages, tokenize=False).rstrip("\n")


def test_prompt_and_completion(tokenizer):
    plain = encode_sample({"prompt": "12+30=", "completion": "42"}, tokenizer)
    assert plain[0] == [*tokenizer.encode("12+30="), *tokenizer.encode("42"), tokenizer.eos_token_id]
    assert with_loss(plain, tokenizer) == ["42<|endoftext|>"]
    ended = encode_sample({"prompt": "12+30=", "completion": "42<|endoftext|>"}, tokenizer)
    assert ended == plain
    record = {"prompt": CONVERSATION[:4], "completion": CONVERSATION[4:]}
    assert with_loss(encode_sample(record, tokenizer), tokenizer) == ["84<|endoftext|>"]


def test_files_and_split(tokenizer, tmp_path):
    records = [{"messages": [turn("user", f"{i}?"), turn("assistant", f"{i}")]} for i in range(40)]
    plain = write_jsonl(tmp_path / "a.jsonl", records)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(plain.read_bytes())
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    splits = [read_chat(str(tmp_path / name), tokenizer, 64, 0.25) for name in ("a.jsonl", "a.jsonl.gz", "a.parquet")]
    for split in splits:
        assert len(split.train) + len(split.valid) == 40
        assert 2 < len(split.valid) < 20
        assert split.train.tokens.tolist() == splits[0].train.tokens.tolist()
        assert (split.shortened, split.dropped) == (0, 0)
    assert len(read_chat(str(plain), tokenizer, 64).valid) == 0
    assert len(read_chat(str(plain), tokenizer, 64, 1e-9).valid) == 1


def test_long_samples_are_shortened_or_dropped(tokenizer, tmp_path):
    records = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": " whale" * 50},
        {"prompt": " whale" * 50, "completion": "b"},
    ]
    split = read_chat(str(write_jsonl(tmp_path / "a.jsonl", records)), tokenizer, 10)
    assert (len(split.train), split.shortened, split.unended, split.dropped) == (2, 2, 1, 1)
    sizes = [len(encode_sample(record, tokenizer)[0]) for record in records]
    assert split.sizes == (min(sizes), max(sizes))
    assert split.cuts("a.jsonl", "sequence_length", 10) == (
        "a.jsonl: 2 of 3 samples were cut at sequence_length = 10, 1 of them within their last answer, and 1 were "
        f"dropped (no assistant token within it); they have {min(sizes)} to {max(sizes)} tokens"
    )
    assert max(split.train.offsets[1:] - split.train.offsets[:-1]) == 11
    write_jsonl(tmp_path / "a.jsonl", records[2:])
    with pytest.raises(UserError, match=r"within data\.sequence_length = 10 \(they have \d+ tokens\); check"):
        read_chat(str(tmp_path / "a.jsonl"), tokenizer, 10)
    write_jsonl(tmp_path / "a.jsonl", records[1:2])
    cut = read_chat(str(tmp_path / "a.jsonl"), tokenizer, 10).cuts("a.jsonl", "data.sequence_length", 10)
    assert cut.startswith("warning: a.jsonl: 1 of 1 samples were cut")
    assert cut.endswith("no sample shows how an answer ends, so the model learns none: raise data.sequence_length")
    assert read_chat(str(write_jsonl(tmp_path / "a.jsonl", records[:1])), tokenizer, 10).cuts("a", "b", 10) is None


def test_templates_that_cannot_be_masked(tokenizer):
    r1 = with_template(tokenizer, R1)
    with pytest.raises(UserError, match="line 7: the chat template changes earlier text when message 2 is added"):
        encode_sample({"messages": CONVERSATION[1:3]}, r1, "a.jsonl, line 7")
    silent = with_template(tokenizer, R1.replace("OPEN", ""))
    with pytest.raises(UserError, match="omits part of message 2"):
        encode_sample({"messages": CONVERSATION[1:3]}, silent)
    counting = with_template(tokenizer, "{{ messages | length }}" + CHATML)
    with pytest.raises(UserError, match="changes earlier text"):
        encode_sample({"messages": CONVERSATION}, counting)
    with pytest.raises(UserError, match="does not accept these messages"):
        encode_sample({"messages": CONVERSATION}, with_template(tokenizer, "{{ raise_exception('no system') }}"))
    with pytest.raises(UserError, match="no chat template"):
        encode_sample({"messages": CONVERSATION}, with_template(tokenizer, None))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, r"a\.jsonl, line 1 has neither messages nor prompt and completion .* \['text'\]"),
        ({"messages": []}, "non-empty list"),
        ({"messages": [{"role": "user"}]}, r"line 1: messages\.0: needs a content"),
        ({"messages": [turn("user", None)]}, r"messages\.0: needs a content"),
        ({"prompt": "x", "completion": [turn("assistant", "y")]}, "both text or both lists"),
        ({"messages": [turn("user", "only a question")]}, "no sample with an assistant turn"),
    ],
)
def test_records_that_do_not_fit(tokenizer, tmp_path, record, message):
    with pytest.raises(UserError, match=message):
        read_chat(str(write_jsonl(tmp_path / "a.jsonl", [record])), tokenizer, 64)


TOOLED = """\
{%- if tools %}{{ '<|system|>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}{{ '<|' + m['role'] + '|>' + (m['content'] or '') }}
{%- for c in m['tool_calls'] or [] %}{{ '<tool_call>' + (c['function'] | tojson) + '</tool_call>' }}{% endfor %}
{%- if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
WRITTEN = '<tool_call>{"name": "look", "arguments": {"city": "Oslo"}}</tool_call><|endoftext|>'


def calling(arguments, **more):
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {
        "name": "look", "arguments": arguments}}]} | more  # fmt: skip


def looking(arguments, **more):
    talk = [turn("user", "Oslo?"), calling(arguments), turn("tool", "rain"), turn("assistant", "Rain.")]
    return {"messages": talk, "tools": [LOOK]} | more


def test_a_model_is_told_of_tools_and_learns_its_calls(tokenizer):
    tooled = with_template(tokenizer, TOOLED)
    wanted = None
    for record in (
        looking('{"city": "Oslo"}'),
        looking({"city": "Oslo"}),
        looking({"city": "Oslo"}, tools=json.dumps([LOOK])),
        looking({"city": "Oslo"}, tools=[LOOK["function"]]),
        looking({"city": "Oslo"}) | {"messages": None, "prompt": looking("")["messages"][:1],
                                     "completion": looking({"city": "Oslo"})["messages"][1:]},
    ):  # fmt: skip
        sample = encode_sample(record, tooled)
        assert with_loss(sample, tooled) == [WRITTEN, "Rain.<|endoftext|>"]
        text = tooled.decode(sample[0])
        assert text.startswith("<|system|>" + json.dumps(LOOK))
        wanted = wanted or text
        assert text == wanted


@pytest.mark.parametrize("name", ["told", "silent"])
def test_training_shows_what_serving_shows(tokenizer, name):
    served = with_template(tokenizer, {"told": TOOLED, "silent": tokenizer.chat_template}[name])
    record = looking('{"city": "Oslo"}')
    sample = encode_sample(record, served)
    prompt = ChatTemplate(served).render(read_messages(record["messages"][:3], ""), read_tools([LOOK], ""))
    assert served.decode(sample[0]) == prompt + "Rain.<|endoftext|>"
    assert "look" in prompt
    assert all("look" in said or said == "Rain.<|endoftext|>" for said in with_loss(sample, served))


def test_parquets_nulls_are_not_taught(tokenizer, tmp_path):
    tooled = with_template(tokenizer, TOOLED)
    other = looking({"day": "Monday"})
    parquet.write_table(pyarrow.Table.from_pylist([looking({"city": "Oslo"}), other]), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", [looking({"city": "Oslo"}), other])
    (tmp_path / "a.parquet").rename(tmp_path / "A.PARQUET")
    splits = [read_chat(str(tmp_path / name), tooled, 400) for name in ("A.PARQUET", "a.jsonl")]
    assert tooled.decode(splits[0].train.tokens) == tooled.decode(splits[1].train.tokens)
    assert "null" not in tooled.decode(splits[0].train.tokens)
    write_jsonl(tmp_path / "b.jsonl", [looking({"city": None})])  # here somebody has written it
    assert '{"city": null}' in tooled.decode(read_chat(str(tmp_path / "b.jsonl"), tooled, 400).train.tokens)


def test_functions_are_tools(tokenizer):
    """OpenAI's name for them before there were tools."""
    tooled = with_template(tokenizer, TOOLED)
    record = looking({"city": "Oslo"})
    older = {"messages": record["messages"], "functions": [record["tools"][0]["function"]]}
    assert encode_sample(older, tooled) == encode_sample(record, tooled)


def test_an_answer_of_no_weight_bears_no_loss(tokenizer):
    record = {
        "messages": [
            turn("user", "a"),
            turn("assistant", "b") | {"weight": 0},
            turn("user", "c"),
            turn("assistant", "d"),
        ]
    }
    assert with_loss(encode_sample(record, tokenizer), tokenizer) == ["d<|endoftext|>"]


ONE_CALL = TOOLED.replace(
    "{%- for c in", "{%- if m['tool_calls'] | length > 1 %}{{ raise_exception('one') }}{% endif %}{%- for c in"
)


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        (looking("{}", tools="not JSON"), TOOLED, r"line 3: tools: is text, but not JSON"),
        (looking("{}", tools=[{"type": "search"}]), TOOLED, r"line 3: tools\.0: must be a function"),
        ({"messages": [None]}, TOOLED, r"line 3: messages\.0: must be an object"),
        ({"messages": None}, TOOLED, r"line 3 has neither messages .* but \[\]"),
        ({"messages": [turn("robot", "a")]}, TOOLED, r"messages\.0\.role: must be one of"),
        ({"messages": [turn("user", "a"), turn("assistant", "b") | {"weight": 2}]}, TOOLED, "weight: must be 0 or 1"),
        ({"messages": [turn("user", "a"), turn("assistant", "b") | {"reasoning_content": "hm"}]}, TOOLED,
         "omits part of message 2"),
        ({"prompt": "a", "completion": "b", "tools": [LOOK]}, TOOLED, "tools need the chat template"),
        ({"prompt": "a\ud800", "completion": "b"}, TOOLED, "half a character"),
        ({"messages": [turn("user", "a\ud800"), turn("assistant", "b")]}, TOOLED, "half a character"),
        ({"prompt": [turn("user", "a")], "completion": "b"}, TOOLED, "both be text, or both lists"),
        ({"messages": [turn("user", "a"), calling("{}", tool_calls=calling("{}")["tool_calls"] * 2)]}, ONE_CALL,
         "ends a turn with each call"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused_with_its_line(tokenizer, record, template, message):
    with pytest.raises(UserError, match=message):
        encode_sample(record, with_template(tokenizer, template), "a.jsonl, line 3")


def test_tokens_take_few_bytes(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": " whale 500" * 500} for _ in range(100)])
    tracemalloc.start()
    split = read_chat(str(path), tokenizer, 10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * len(split.train.tokens) + (2 << 20)


def test_text_files_are_not_chat_data(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a\.txt is none of \.jsonl, \.jsonl\.gz, \.parquet; convert"):
        read_chat(str(tmp_path / "a.txt"), tokenizer, 64)


def test_tokenizer_without_chat_tokens_still_works():
    plain = train_tokenizer(["some text"], TokenizerSection(vocab_size=270))
    sample = encode_sample({"messages": CONVERSATION}, plain)
    assert with_loss(sample, plain)[1] == "84<|endoftext|>"
