"""Tokenizers and loaders from a recipe's data sections."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from rorqual.data.chat_dataset import ChatSplit, read_chat
from rorqual.data.corpus import read_texts
from rorqual.data.fim import FillInTheMiddle
from rorqual.data.loader import Heldout, Loader, PackedDataset, bytes_of_tokens
from rorqual.data.text_pieces import split_text
from rorqual.data.token_shards import CHUNK_CHARACTERS, Documents, end_token, pack_source
from rorqual.data.tokenizer import load_tokenizer, train_tokenizer
from rorqual.errors import UserError
from rorqual.recipe import ChatDataSection, DataSection, TokenizerSection
from rorqual.tokenizer_protocol import Tokenizer

TOKENIZER_CHARACTERS = 100_000_000  # of all sources; the merges of a small vocabulary converge long before


def open_tokenizer(section: TokenizerSection, data: DataSection) -> Tokenizer:
    """The tokenizer at `section.path`, or one trained on the first documents of each source, by source weight."""
    if section.path is not None:
        return load_tokenizer(section.path)
    return train_tokenizer(_first_texts(data), section, fim=data.fim_rate > 0)


def _first_texts(data: DataSection) -> Iterator[str]:
    total = sum(source.weight for source in data.sources)
    for source in data.sources:
        share = left = TOKENIZER_CHARACTERS * source.weight / total
        for text in itertools.chain.from_iterable(split_text(text, CHUNK_CHARACTERS) for text in read_texts(source)):
            if left <= 0:
                break
            left -= len(text)
            yield text
        if left == share:
            raise UserError(f"{source.path} holds no text; use a source with documents")


def open_pretrain_data(
    section: DataSection, tokenizer: Tokenizer, cache: Path, seed: int
) -> tuple[Loader, Heldout | None]:
    """(training loader, held-out rows or None where none are requested); sources are tokenised into `cache` once."""
    fim = FillInTheMiddle.of(tokenizer, section.fim_rate, seed) if section.fim_rate else None
    padding = end_token(tokenizer)
    packed = [
        pack_source(source, tokenizer, Path(cache), section.valid_fraction, fim, section.workers)
        for source in section.sources
    ]

    def rows(documents: Documents) -> PackedDataset:
        return PackedDataset(documents, section.sequence_length, padding, section.isolate_documents)

    train = Loader([rows(p["train"]) for p in packed], [source.weight for source in section.sources], seed)
    held = [(rows(p["valid"]), s.weight) for p, s in zip(packed, section.sources, strict=True) if len(p["valid"])]
    if not held:
        return train, None
    valid, weights = zip(*held, strict=True)
    return train, Heldout(list(valid), bytes_of_tokens(tokenizer), list(weights))


def open_chat_data(
    section: ChatDataSection, tokenizer: Tokenizer, seed: int, length_field: str = "data.sequence_length"
) -> tuple[Loader, Heldout | None, ChatSplit]:
    """(training loader, held-out rows or None, the samples with counts of shortened and dropped ones).

    length_field: what the user's recipe calls the section's sequence_length. Samples are isolated from each other:
    positions restart and `Batch.documents` (the document mask) is set.
    """
    split = read_chat(section.path, tokenizer, section.sequence_length, section.valid_fraction, length_field)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def rows(documents: Documents) -> PackedDataset:
        return PackedDataset(documents, section.sequence_length, padding or 0, isolate=True, whole=True)

    valid = Heldout([rows(split.valid)], bytes_of_tokens(tokenizer)) if len(split.valid) else None
    return Loader([rows(split.train)], [1.0], seed), valid, split
