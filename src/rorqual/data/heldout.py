"""Write a source's tokenised documents to disk, split into training and held-out text."""

import json
import os
import shutil
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rorqual.errors import UserError

SPLITS = ("train", "valid")
LONG = 1024  # tokens from which on a document much larger than the fraction is cut rather than held out whole


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of tokenised text chunks; documents up to `CHUNK_CHARACTERS` are one chunk."""

    tokens: np.ndarray  # of all chunks, each document with its end-of-text token
    lengths: list[int]  # tokens of each chunk
    sizes: list[int]  # UTF-8 bytes of each chunk
    held_out: list[bool]  # per chunk
    last: list[bool]  # whether the chunk is the last of its document


class SplitFile:
    """Token file of one split, with the length (tokens) and size (UTF-8 bytes) of each of its documents."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype = path, dtype
        self.lengths, self.sizes = array("q"), array("q")
        path.touch()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def bytes(self) -> int:
        return sum(self.sizes)

    def append(self, tokens: np.ndarray) -> None:
        with open(self.path, "ab") as file:
            file.write(tokens.tobytes())

    def move_last(self, other: "SplitFile", tokens: int | None = None) -> None:
        """Move the last document to `other`, or only that many tokens of its end."""
        length, size = self.lengths.pop(), self.sizes.pop()
        tokens = tokens or length
        with open(self.path, "r+b") as file:
            position = file.seek(-tokens * self.dtype.itemsize, os.SEEK_END)
            with open(other.path, "ab") as target:
                shutil.copyfileobj(file, target)
            file.truncate(position)
        moved = size if tokens == length else size * tokens // length
        other.lengths.append(tokens)
        other.sizes.append(moved)
        if tokens < length:
            self.lengths.append(length - tokens)
            self.sizes.append(size - moved)


class ShardWriter:
    """Appends batches to the token files of both splits; `finish` writes the index and syncs to disk."""

    def __init__(self, folder: Path, vocab_size: int, valid_fraction: float) -> None:
        self.folder, self.valid_fraction = folder, valid_fraction
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.splits = {name: SplitFile(folder / f"{name}.tokens", self.dtype) for name in SPLITS}
        self._open: SplitFile | None = None  # split of the previous chunk of the same document

    def write(self, batch: EncodedBatch) -> None:
        train, valid = self.splits.values()
        side = np.zeros(len(batch.lengths), np.int8)  # 0: dropped; 1: train; 2: valid
        for i, (length, size, held) in enumerate(zip(batch.lengths, batch.sizes, batch.held_out, strict=True)):
            split = valid if held else train
            if self._open is split:  # next chunk of the same document
                split.lengths[-1] += length
                split.sizes[-1] += size
            elif length > 1:  # some tokenizers drop some texts, such as white space
                split.lengths.append(length)
                split.sizes.append(size)
            else:
                split = None
            if split is not None:
                side[i] = 1 + held
            self._open = None if batch.last[i] else split
        of_token = np.repeat(side, batch.lengths)
        train.append(batch.tokens[of_token == 1])
        valid.append(batch.tokens[of_token == 2])

    def finish(self, name: str) -> None:
        """Write offsets and index.json. Raises UserError, with the source's `name`, where there are no documents."""
        train, valid = self.splits.values()
        documents = len(train) + len(valid)
        if not documents:
            raise UserError(f"{name} holds no documents; check the path and that they are not empty")
        if self.valid_fraction:
            self._balance(name)
        index: dict[str, object] = {"dtype": self.dtype.name}
        for split, found in self.splits.items():
            offsets = np.concatenate([[0], np.cumsum(np.frombuffer(found.lengths, np.int64))]).astype(np.int64)
            np.save(self.folder / f"{split}.offsets.npy", offsets)
            index[split] = {"documents": len(found), "tokens": int(offsets[-1]), "bytes": found.bytes}
        (self.folder / "index.json").write_text(json.dumps(index, indent=1))

    def _balance(self, name: str) -> None:
        """Move documents so that no split is empty and the held-out bytes are about `valid_fraction`."""
        train, valid = self.splits.values()
        held = valid.bytes
        target = self.valid_fraction * (train.bytes + held)
        if held < target / 2 or not len(valid):
            self._move(train, valid, target - held)
        elif held > 2 * target or not len(train):
            self._move(valid, train, held - target)
        if not len(train) or not len(valid):
            print(f"{name}: too small to hold out any of it; it is not in the validation", file=sys.stderr)

    def _move(self, source: SplitFile, target: SplitFile, size: float) -> None:
        """Move about `size` bytes from the end: whole documents, then the end of a document that is too long.

        A short document is moved whole to an empty target where there is nothing else to move.
        """
        left = size
        while len(source) > 1 and source.sizes[-1] <= left:
            left -= source.sizes[-1]
            source.move_last(target)
        if left < size / 2:
            return
        length, last_size = source.lengths[-1], source.sizes[-1]
        only = len(source) == 1 and not len(target)
        if length >= (4 if only else LONG):
            least = 2 if length < LONG else LONG // 16
            source.move_last(target, min(max(round(length * left / last_size), least), length - least))
        elif not only and not len(target):
            source.move_last(target)
