"""A small tokenizer."""

import pytest

from helpers.documents import make_texts
from rorqual.data.tokenizer import train_tokenizer
from rorqual.recipe import TokenizerSection


@pytest.fixture(scope="session")
def tokenizer():
    """500 tokens with chat, reasoning and fill-in-the-middle tags, trained on invented documents."""
    section = TokenizerSection(
        vocab_size=500, whole_numbers=100, special_tokens=["<|user|>", "<|assistant|>", "<think>", "</think>"]
    )
    return train_tokenizer(make_texts(200), section, fim=True)
