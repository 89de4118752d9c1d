"""A source's documents on their way to disk, shared out between training and held-out text."""

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
LONG = 1024  # tokens of a document that is cut, rather than held out whole, where it is much more than the share


@dataclass(frozen=True)
class Encoded:
    tokens: np.ndarray  # of all its pieces, the last of a document with its end
    lengths: list[int]
    sizes: list[int]  # UTF-8 bytes of each piece
    held_out: list[bool]
    last: list[bool]  # of its document


class Split:
    """One side's file of tokens, and of each of its documents the length in tokens and the size in UTF-8 bytes."""

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

    def give_last(self, other: "Split", tokens: int | None = None) -> None:
        """Move the last document over, or so many tokens from its end."""
        length, size = self.lengths.pop(), self.sizes.pop()
        tokens = tokens or length
        with open(self.path, "r+b") as file:
            place = file.seek(-tokens * self.dtype.itemsize, os.SEEK_END)
            with open(other.path, "ab") as target:
                shutil.copyfileobj(file, target)
            file.truncate(place)
        moved = size if tokens == length else size * tokens // length
        other.lengths.append(tokens)
        other.sizes.append(moved)
        if tokens < length:
            self.lengths.append(length - tokens)
            self.sizes.append(size - moved)


class Writer:
    """Appends batches to the files of both splits; `finish` makes them whole on disk."""

    def __init__(self, folder: Path, vocab_size: int, valid_fraction: float) -> None:
        self.folder, self.valid_fraction = folder, valid_fraction
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.splits = {name: Split(folder / f"{name}.tokens", self.dtype) for name in SPLITS}
        self._open: Split | None = None  # the side that the document's piece before went to

    def write(self, batch: Encoded) -> None:
        train, valid = self.splits.values()
        side = np.zeros(len(batch.lengths), np.int8)  # 0: left out; 1: train; 2: valid
        for i, (length, size, held) in enumerate(zip(batch.lengths, batch.sizes, batch.held_out, strict=True)):
            split = valid if held else train
            if self._open is split:  # pieces of a document that stay together
                split.lengths[-1] += length
                split.sizes[-1] += size
            elif length > 1:  # some tokenizers make nothing of some texts, such as white space
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
        train, valid = self.splits.values()
        documents = len(train) + len(valid)
        if not documents:
            raise UserError(f"{name} holds no documents; check the path and that they are not empty")
        if self.valid_fraction:
            self._share(name)
        index: dict = {"dtype": self.dtype.name}
        for split, found in self.splits.items():
            offsets = np.concatenate([[0], np.cumsum(np.frombuffer(found.lengths, np.int64))]).astype(np.int64)
            np.save(self.folder / f"{split}.offsets.npy", offsets)
            index[split] = {"documents": len(found), "tokens": int(offsets[-1]), "bytes": found.bytes}
        (self.folder / "index.json").write_text(json.dumps(index, indent=1))
        for path in self.folder.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    def _share(self, name: str) -> None:
        """Both sides get something, the held-out one about its share of bytes, in sources of a few documents too."""
        train, valid = self.splits.values()
        held = valid.bytes
        due = self.valid_fraction * (train.bytes + held)
        if held < due / 2 or not len(valid):
            self._give(train, valid, due - held)
        elif held > 2 * due or not len(train):
            self._give(valid, train, held - due)
        if not len(train) or not len(valid):
            print(f"{name}: too small to hold any of it out; its share is not in the validation", file=sys.stderr)

    def _give(self, source: Split, target: Split, due: float) -> None:
        """About so many bytes from the end: whole documents, and of one too long for that its own end.

        Where a short document is all that could be given, it goes whole to a side that has none.
        """
        left = due
        while len(source) > 1 and source.sizes[-1] <= left:
            left -= source.sizes[-1]
            source.give_last(target)
        if left < due / 2:
            return
        length, size = source.lengths[-1], source.sizes[-1]
        only = len(source) == 1 and not len(target)
        if length >= (4 if only else LONG):
            least = 2 if length < LONG else LONG // 16
            source.give_last(target, min(max(round(length * left / size), least), length - least))
        elif not only and not len(target):
            source.give_last(target)
