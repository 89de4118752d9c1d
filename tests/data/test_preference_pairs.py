"""Preference pairs from files: their layouts, what is held out, and what is refused."""

import json

import numpy as np
import pytest
import torch

from rorqual.data.preference_pairs import ConversationEncoder, PairDataset, read_pairs
from rorqual.data.prompts_file import read_prompts
from rorqual.data.tokenizer import train_tokenizer
from rorqual.errors import UserError
from rorqual.recipe import TokenizerSection

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer():
    section = TokenizerSection(vocab_size=280, special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer = train_tokenizer(["Say yes or no."], section)
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "<|im_end|>"
    yield tokenizer
    tokenizer.chat_template = None


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


LAYOUTS = [
    {"prompt": "Yes?", "chosen": "Yes.", "rejected": "No."},
    {"prompt": [user("Yes?")], "chosen": [said("Yes.")], "rejected": [said("No.")]},
    {
        "prompt": "Yes?",
        "chosen": [user("Yes?"), said("Yes.")],
        "rejected": [user("Yes?"), said("No.")],
    },  # UltraFeedback
    {"chosen": [user("Yes?"), said("Yes.")], "rejected": [user("Yes?"), said("No.")]},
    {"prompt": "Yes?", "chosen": "Yes.", "rejected": [said("No.")], "score": 3},
]


@pytest.mark.parametrize("record", LAYOUTS)
def test_layouts(record, chatty, tmp_path):
    train = read_pairs(written(tmp_path / "p.jsonl", record), chatty, 64).train
    texts = [chatty.decode(part) for part in np.split(train.documents.tokens, train.documents.offsets[1:-1])]
    begin = "<|im_start|>user\nYes?<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [f"{begin}Yes.<|im_end|>", f"{begin}No.<|im_end|>"]


def test_without_a_template_lines_and_the_end_token(tokenizer):
    read = ConversationEncoder(tokenizer)
    assert tokenizer.decode(read([user("Yes?"), said("No.")])) == f"Yes?\nNo.{tokenizer.eos_token}"
    name = tokenizer.eos_token
    assert read([user(name), said("No.")]).count(tokenizer.eos_token_id) == 1  # a name in a text is text


def test_a_row_is_a_pair_scored_at_the_last_tokens():
    pairs = [([1, 2, 3], [4, 5]), ([6] * 20, [7] * 30)]
    dataset = PairDataset(pairs, padding_token=0)
    batch = dataset.batch(np.array([0]))
    assert batch.inputs.tolist() == [[1, 2, 3, 4, 5, *[0] * 11]]  # to a multiple of 16
    assert batch.weights.tolist() == [[0, 0, 1, 0, -1, *[0] * 11]]
    assert batch.positions[0, :5].tolist() == [0, 1, 2, 0, 1]
    mask = batch.attention_mask
    assert mask is not None
    assert mask[0, 0, 4, :5].tolist() == [False, False, False, True, True]  # the worse one does not see the better one
    both = dataset.batch(np.array([1, 0]))
    assert both.inputs.shape == (2, 50)  # the longest pair
    assert both.weights[0].nonzero().flatten().tolist() == [19, 49]
    assert [len(b.inputs) for b in dataset.batches(1)] == [1, 1]
    assert torch.equal(next(dataset.batches(1)).inputs, batch.inputs)  # the shortest first


def test_all_pairs_of_a_prompt_are_held_out_or_none(tokenizer, tmp_path):
    records = [
        {"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": f"no {n} {k}"} for k in range(3) for n in range(40)
    ]
    split = read_pairs(written(tmp_path / "p.jsonl", *records), tokenizer, 64, 0.25)
    assert split.valid is not None
    assert len(split.train) + len(split.valid) == 120
    assert len(split.valid) % 3 == 0
    assert 3 <= len(split.valid) <= 54
    few = read_pairs(written(tmp_path / "q.jsonl", *records[:2]), tokenizer, 64, 0.001)
    assert (len(few.train), len(few.valid or [])) == (1, 1)  # one at least, where a fraction is asked for
    assert read_pairs(written(tmp_path / "r.jsonl", records[0]), tokenizer, 64, 0.5).valid is None


def test_long_pairs_are_left_out(tokenizer, tmp_path):
    long = {"prompt": "a?", "chosen": "b" * 50, "rejected": "c"}
    split = read_pairs(written(tmp_path / "p.jsonl", LAYOUTS[0], long), tokenizer, 32)
    assert (len(split.train), split.dropped) == (1, 1)
    with pytest.raises(UserError, match=r"all 1 pairs are longer than data.sequence_length = 32; raise it"):
        read_pairs(written(tmp_path / "q.jsonl", long), tokenizer, 32)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"prompt": "a", "chosen": "b"}, r"line 1: field rejected \(text, or a list of messages\) is missing; add it"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, r"field chosen .* is a int; correct it"),
        ({"chosen": "a", "rejected": "b"}, r"field prompt .* is missing or empty; add it"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, r"field prompt .* must be text or a list"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, r"chosen and rejected are equal, so neither is better"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, r"rejected does not end with an assistant's answer"),
        ({"prompt": "a", "chosen": [user("a")], "rejected": "b"}, r"chosen does not end with an assistant's answer"),
        (
            {"prompt": "a", "chosen": [user("c"), said("b")], "rejected": "b"},
            r"chosen and rejected answer different prompts",
        ),
    ],
)
def test_what_is_refused(record, sentence, tokenizer, tmp_path):
    with pytest.raises(UserError, match=sentence):
        read_pairs(written(tmp_path / "p.jsonl", record), tokenizer, 64)


def test_files_without_pairs_or_prompts(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"empty\.jsonl has no lines; write one JSON object with prompt, chosen and"):
        read_pairs(written(tmp_path / "empty.jsonl"), tokenizer, 64)
    assert read_prompts(written(tmp_path / "a.jsonl", {"prompt": "a"}, {"question": "b"}, {"prompt": "a"})) == [
        "a",
        "b",
    ]
    with pytest.raises(UserError, match=r"line 1: field prompt \(or question\) is not text; add it"):
        read_prompts(written(tmp_path / "b.jsonl", {"prmpt": "a"}))
    with pytest.raises(UserError, match=r"has 1 different prompts; pairs need two at least"):
        read_prompts(written(tmp_path / "c.jsonl", {"prompt": "a"}))
