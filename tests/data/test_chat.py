import gzip

import pyarrow
import pytest
from made_documents import write_jsonl
from pyarrow import parquet

from rorqual.data.chat import encode_sample, read_chat
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
    from rorqual.data.tokenizer import _finish

    copy = _finish(type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()), [])
    copy.chat_template = template
    if eos:
        copy.add_special_tokens({"eos_token": eos})
    return copy


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
    assert (len(split.train), split.shortened, split.dropped) == (2, 2, 1)
    assert max(split.train.offsets[1:] - split.train.offsets[:-1]) == 11
    write_jsonl(tmp_path / "a.jsonl", records[2:])
    with pytest.raises(UserError, match=r"no sample with an assistant's turn within data\.sequence_length = 10"):
        read_chat(str(tmp_path / "a.jsonl"), tokenizer, 10)


def test_templates_that_cannot_be_masked(tokenizer):
    r1 = with_template(tokenizer, R1)
    with pytest.raises(UserError, match="line 7: the chat template changes earlier text when message 2 is added"):
        encode_sample({"messages": CONVERSATION[1:3]}, r1, "a.jsonl, line 7")
    silent = with_template(tokenizer, R1.replace("OPEN", ""))
    with pytest.raises(UserError, match="leaves out part of message 2"):
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
        ({"messages": [turn("user", "only a question")]}, "no sample with an assistant's turn"),
    ],
)
def test_records_that_do_not_fit(tokenizer, tmp_path, record, message):
    with pytest.raises(UserError, match=message):
        read_chat(str(write_jsonl(tmp_path / "a.jsonl", [record])), tokenizer, 64)


def test_text_files_are_not_chat_data(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a\.txt is not \.jsonl"):
        read_chat(str(tmp_path / "a.txt"), tokenizer, 64)


def test_tokenizer_without_chat_tokens_still_works():
    plain = train_tokenizer(["some text"], TokenizerSection(vocab_size=270))
    sample = encode_sample({"messages": CONVERSATION}, plain)
    assert with_loss(sample, plain)[1] == "84<|endoftext|>"
