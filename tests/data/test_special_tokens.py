"""Names of control tokens in what people write are text; all other text has the tokens that it always had."""

import numpy as np
import pytest

from helpers.scripted_models import BYTE_LEVEL, CHAT, LEGACY, METASPACE, vocabulary
from rorqual.data.chat_dataset import encode_sample
from rorqual.data.special_tokens import ESCAPE, encode, escape, escape_message
from rorqual.data.token_shards import pack_source
from rorqual.errors import UserError
from rorqual.recipe import Source

KINDS = (BYTE_LEVEL, LEGACY, METASPACE)
CONTROL = ("<|im_start|>", "<｜end▁of▁sentence｜>", "[INST]")
WORDS = ("<think>", "</think>", "<tool_call>", "<|fim_prefix|>", "<h1>", "fine")
TEMPLATE = CHAT.replace("{%", "{# <tool_call> #}{%", 1)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return vocabulary(request.param, CONTROL, WORDS, TEMPLATE)


def rendered(tokenizer, *messages):
    said = [escape_message(m, tokenizer) for m in messages]
    return encode(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True), tokenizer)


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize("name", [*CONTROL, "<turn>", "<say>", "<end>", *WORDS[:4]])
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_a_name_in_a_message_is_text(tokenizer, name, role):
    said = {"role": role, "content": f"what is {name} for{name}{name[:3]}{name}?"}
    tokens = rendered(tokenizer, said)
    names = tokenizer.convert_ids_to_tokens(tokens)
    assert [names.count(n) for n in ("<turn>", "<say>")] == [1, 1], "those of the template"
    assert names.count(name) == (name in ("<turn>", "<say>"))
    read = tokenizer.decode(tokens).replace("▁", " ")
    assert read == said["content"].replace("▁", " ") + "<turn><say>"


@pytest.mark.parametrize(
    "said", ["", " ", "hi there", " <h1>fine </h1> and\n\nfine", "a < b > c |x| [INS T]", "é 🐋 <thin", "x" * 500]
)
def test_text_without_names_has_the_template_s_own_tokens(tokenizer, said):
    messages = [user(said), user("and " + said)]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert rendered(tokenizer, *messages) == theirs


@pytest.mark.parametrize("said", ["a fine [INST] b", "<turn>", " <turn> fine <say>x\n<think>é"])
def test_what_stands_around_a_name_keeps_its_tokens(tokenizer, said):
    """The same as if the name were one that no tokenizer knows."""
    other = said
    for name in ("[INST]", "<turn>", "<say>", "<think>"):
        other = other.replace(name, name[0] + "q" + name[2:])
    ours, theirs = rendered(tokenizer, user(said)), rendered(tokenizer, user(other))
    assert len(ours) == len(theirs)
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) == sum(
        said.count(n) for n in ("[INST]", "<turn>", "<say>", "<think>")
    )


def test_an_assistant_keeps_its_thoughts_and_calls_and_ends_no_turn(tokenizer):
    said = {"role": "assistant", "content": "<think>so</think><tool_call>x<turn><|im_start|>system"}
    names = tokenizer.convert_ids_to_tokens(rendered(tokenizer, user("a"), said))
    assert [names.count(n) for n in ("<think>", "</think>", "<tool_call>", "<turn>", "<|im_start|>")] == [1, 1, 1, 2, 0]


def test_names_deep_in_tools_and_arguments_are_text(tokenizer):
    tool = {"function": {"name": "f", "parameters": {"<turn>": ["<end>", {"x": "a<say>", "n": 3}]}}}
    broken = escape(tool, tokenizer)
    text = str(broken)
    assert not any(name in text for name in ("<turn>", "<end>", "<say>"))
    assert text.replace(repr(ESCAPE)[1:-1], "") == str(tool)


def test_a_break_cannot_be_brought_along(tokenizer):
    names = tokenizer.convert_ids_to_tokens(rendered(tokenizer, user(f"<{ESCAPE}turn>a<tu{ESCAPE}rn>")))
    assert names.count("<turn>") == 1


def test_half_a_character_is_a_sentence(tokenizer):
    with pytest.raises(UserError, match="half a character"):
        rendered(tokenizer, user("a\ud800"))


@pytest.mark.parametrize("record", [{"messages": [user("a\ud800")]}, {"prompt": "a", "completion": "\udfff"}])
def test_half_a_character_in_a_sample_is_told_with_its_line(tokenizer, record):
    for message in record.get("messages", []):
        record = {"messages": [message, {"role": "assistant", "content": "b"}]}
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: .*half a character"):
        encode_sample(record, tokenizer, "a.jsonl, line 3")


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_s_pieces_are_the_tokens_of_the_whole(kind):
    tokenizer = vocabulary(kind, CONTROL, WORDS)
    record = {"prompt": "what is it <think>", "completion": " six</think> six"}
    tokens, marks = encode_sample(record, tokenizer)
    names = tokenizer.convert_ids_to_tokens(tokens)
    answer = [n for n, m in zip(names, marks, strict=True) if m]
    space = "Ġ" if kind == BYTE_LEVEL else "▁"
    assert answer[0] in (space, space + "s"), "one space, not two"
    assert answer[1] in ("s", "i")
    assert (names.count("<think>"), names.count("</think>"), names[-1]) == (1, 1, "<end>")


def test_a_sample_s_question_holds_no_marks():
    tokenizer = vocabulary(BYTE_LEVEL, CONTROL, WORDS)
    messages = [user("is <think> or <end> a tag?"), {"role": "assistant", "content": "<think>hm</think>yes <end>"}]
    tokens, marks = encode_sample({"messages": messages}, tokenizer)
    names = tokenizer.convert_ids_to_tokens(tokens)
    assert (names.count("<think>"), names.count("</think>"), names.count("<end>")) == (1, 1, 0)
    assert tokenizer.decode([t for t, m in zip(tokens, marks, strict=True) if m]) == "<think>hm</think>yes <end><turn>"


@pytest.mark.parametrize("kind", KINDS)
def test_documents_hold_no_special_tokens(kind, tmp_path):
    tokenizer = vocabulary(kind, CONTROL, WORDS)
    said = "a<end>b<|im_start|> <|fim_prefix|>c <think>d"
    (tmp_path / "a.txt").write_text(said)
    found = pack_source(Source(path=str(tmp_path / "a.txt")), tokenizer, tmp_path / "cache")["train"].tokens
    names = tokenizer.convert_ids_to_tokens(np.asarray(found).tolist())
    assert (names.count("<end>"), names[-1]) == (1, "<end>")
    assert "<|im_start|>" not in names
    assert "<|fim_prefix|>" not in names
    assert names.count("<think>") == 1, "what a recipe asks for beside the special ones is part of its texts"
    assert tokenizer.decode(found[:-1]).replace(" ", "") == said.replace(" ", "")


@pytest.mark.parametrize("name", ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "[TOOL_CALLS]"])
def test_marks_of_calls_are_no_text_also_where_the_template_has_no_word_of_them(name):
    tokenizer = vocabulary(BYTE_LEVEL, words=(name,))
    names = tokenizer.convert_ids_to_tokens(rendered(tokenizer, user(f"what is {name}?")))
    assert name not in names
    said = {"role": "assistant", "content": name}
    assert name in tokenizer.convert_ids_to_tokens(rendered(tokenizer, user("a"), said))
