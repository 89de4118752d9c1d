"""Text for `rorqual quantize`: windows of tokens to calibrate on, and held-out ones to measure perplexity on."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rorqual.data.chat_dataset import encode_sample
from rorqual.data.chat_template import ChatTemplate
from rorqual.data.corpus import TEXT, find_files, named, read_records, read_texts
from rorqual.data.special_tokens import encode
from rorqual.data.token_shards import end_token
from rorqual.errors import UserError
from rorqual.sections import Source
from rorqual.shapes import Int
from rorqual.tokenizer_protocol import Tokenizer

SAMPLES, SEQUENCE_LENGTH = 128, 512  # the defaults: windows to calibrate on, and tokens of each
HELDOUT_WINDOWS = 16  # at most, to measure perplexity on
OWN_TEXT = "Python's documentation (of the standard library)"


@dataclass(frozen=True)
class TextSettings:
    """Which text to read. calibration: a file, or None; heldout: a file, or None for the end of what is read of
    `calibration`; sequence_length: None for `SEQUENCE_LENGTH`, or the model's context where that is shorter.
    """

    calibration: Path | None = None
    heldout: Path | None = None
    samples: int = SAMPLES
    sequence_length: int | None = None

    def window_length(self, context: int) -> int:
        """Tokens of a window. Raises UserError where the model's `context` is shorter than what was asked for."""
        if self.sequence_length is not None and self.sequence_length > context:
            raise UserError(f"--sequence-length {self.sequence_length}: the model reads at most {context} tokens")
        return self.sequence_length or min(SEQUENCE_LENGTH, context)


@dataclass(frozen=True)
class Windows:
    """Tokens of both kinds; None where there is no text for them. `text`, `heldout_text`: where they are from."""

    calibration: Int[Tensor, "n T"] | None = None
    heldout: Int[Tensor, "m T"] | None = None
    text: str | None = None
    heldout_text: str | None = None


def read_windows(settings: TextSettings, tokenizer: Tokenizer, length: int, calibrate: bool) -> Windows:
    """The text of `settings` in windows of `length` tokens; no window is in both kinds.

    calibrate: a method needs text; without a file it is Python's documentation, which comes with Python. Raises
    UserError for a file that cannot be read or is too short.
    """
    heldout, heldout_text = None, None
    if settings.heldout is not None:
        heldout, heldout_text = _windows(settings.heldout, tokenizer, HELDOUT_WINDOWS, length), str(settings.heldout)
    if settings.calibration is None and not calibrate:
        return Windows(None, heldout, None, heldout_text)
    more = HELDOUT_WINDOWS if heldout is None else 0
    windows = _windows(settings.calibration, tokenizer, settings.samples + more, length, least=2 if more else 1)
    text = OWN_TEXT if settings.calibration is None else str(settings.calibration)
    if heldout is not None:
        return Windows(windows, heldout, text, heldout_text)
    held = max(1, len(windows) - settings.samples, min(HELDOUT_WINDOWS, len(windows) // 10))
    return Windows(windows[:-held], windows[-held:], text, text)


def _windows(path: Path | None, tokenizer: Tokenizer, count: int, length: int, least: int = 1) -> Int[Tensor, "n T"]:
    """The first windows of a text, `count` at most, each after the token that the model's texts begin with."""
    begin = list(tokenizer("").input_ids)
    size = length - len(begin)
    tokens = list(itertools.islice(_tokens(path, tokenizer), count * size))
    found = len(tokens) // size
    if found < least:
        raise UserError(
            f"{path} has {len(tokens)} tokens, which is too short for {least} windows of {length}; give a longer text "
            "or a smaller --sequence-length"
        )
    rows = torch.tensor(tokens[: found * size]).view(found, size)
    return torch.cat([torch.tensor(begin, dtype=rows.dtype).expand(found, -1), rows], dim=1)


def _tokens(path: Path | None, tokenizer: Tokenizer) -> Iterator[int]:
    for document in _documents(path, tokenizer):
        yield from document


def _documents(path: Path | None, tokenizer: Tokenizer) -> Iterator[list[int]]:
    if path is None:
        from pydoc_data.topics import topics

        yield from (encode(topics[name], tokenizer) for name in sorted(topics))
        return
    for file in find_files(str(path)):
        if named(file, *TEXT):
            yield from (encode(text, tokenizer) for text in read_texts(Source(path=str(file))))
            continue
        template = ChatTemplate(tokenizer)
        for where, record in read_records(file):
            if isinstance(text := record.get("text"), str):
                yield [*encode(text, tokenizer), end_token(tokenizer)]
            elif record.get("messages") is not None:
                yield encode_sample(record, tokenizer, where, template)[0]
            else:
                raise UserError(f"{where} has neither a text nor messages but {sorted(record)}; correct it")
