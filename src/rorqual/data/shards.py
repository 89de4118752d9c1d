"""Token shards: a source's documents as one memory-mapped file of tokens, made in parallel, reused when unchanged.

CACHE/FINGERPRINT/
    train.tokens            uint16, or uint32 above 65 536 tokens; every document ends with the end-of-text token
    train.offsets.npy       int64 [documents + 1]: document d is tokens[offsets[d]:offsets[d + 1]]
    valid.tokens, valid.offsets.npy
    index.json              dtype, and for each split its documents, tokens and UTF-8 bytes
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rorqual.data.corpus import describe, read_texts
from rorqual.data.fim import FillInTheMiddle
from rorqual.data.marks import framed_as_special
from rorqual.errors import UserError
from rorqual.recipe import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 2
SPLITS = ("train", "valid")
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 1 << 20


@dataclass(frozen=True)
class Documents:
    """Tokenised documents of at least two tokens each.

    tokens: [N]; offsets: int64 [documents + 1]; weights: [N], how much each token counts as a target, None for 1.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pack_source(
    source: Source,
    tokenizer: "PreTrainedTokenizerFast",
    cache: Path,
    valid_fraction: float = 0.0,
    fim: FillInTheMiddle | None = None,
    workers: int = 1,
) -> dict[str, Documents]:
    """Tokenise one source into `cache`, or find it there, and map its splits `train` and `valid`.

    A document is held out by a hash of its text, so copies of it stay on one side and the split is the same for
    every seed. If that holds out none, though some are asked for, the last document is taken. Documents held out by
    hash are never rearranged by `fim`. Names of special tokens in a document are text. Raises UserError for
    unreadable or empty sources and when the disk is full.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token to end documents with; set it in tokenizer_config.json")
    backend = tokenizer.backend_tokenizer.to_str()
    identity = [FORMAT, describe(source), backend, tokenizer.eos_token_id, valid_fraction, repr(fim)]
    fingerprint = blake2b(json.dumps(identity).encode(), digest_size=10).hexdigest()
    packed, partial = cache / fingerprint, cache / f"{fingerprint}.partial"
    if not packed.is_dir():
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            writer = _Writer(partial, len(tokenizer), valid_fraction)
            encoder = _Encoder(backend, tokenizer.eos_token_id, writer.dtype, valid_fraction, fim)
            for batch in _progress(_in_parallel(encoder, _batches(read_texts(source)), workers), source.path):
                writer.write(batch)
            writer.finish(source.path)
            partial.rename(packed)
        except OSError as e:
            raise UserError(f"{packed} cannot be written ({e}); free space or choose another place") from e
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return {split: _map(packed, split) for split in SPLITS}


def read_index(packed: Path) -> dict:
    path = packed / "index.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}); delete {packed} to have it made again") from e


def _map(packed: Path, split: str) -> Documents:
    index = read_index(packed)
    path = packed / f"{split}.tokens"
    try:
        offsets = np.load(packed / f"{split}.offsets.npy", allow_pickle=False)
        tokens = np.memmap(path, dtype=index["dtype"], mode="r") if offsets[-1] else np.empty(0, index["dtype"])
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}); delete {packed} to have it made again") from e
    if len(tokens) != offsets[-1]:
        raise UserError(f"{path} holds {len(tokens)} tokens, not {offsets[-1]}; delete {packed} to have it made again")
    return Documents(tokens, offsets)


@dataclass(frozen=True)
class _Batch:
    tokens: np.ndarray  # of all its documents, each with its end
    lengths: np.ndarray
    held_out: np.ndarray  # bool [documents]
    sizes: np.ndarray  # UTF-8 bytes of each document


class _Encoder:
    """Turns a list of texts into a _Batch. Called from several threads: the Rust side works without the GIL."""

    def __init__(
        self, backend: str, eos: int, dtype: np.dtype, valid_fraction: float, fim: FillInTheMiddle | None
    ) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(framed_as_special(backend))
        self.tokenizer.encode_special_tokens = True  # their names in a document are text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.eos, self.dtype, self.fim = eos, dtype, fim
        self.threshold = valid_fraction * 2**64

    def __call__(self, texts: list[str]) -> _Batch:
        raw = [text.encode() for text in texts]
        held_out = [int.from_bytes(blake2b(r, digest_size=8).digest(), "little") < self.threshold for r in raw]
        pieces: list[str] = []
        cuts = []
        for text, held in zip(texts, held_out, strict=True):
            cut = None if held or self.fim is None else self.fim.cut(text)
            cuts.append(cut)
            pieces.extend(cut or (text,))
        encoded = iter(self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
        flat: list[int] = []
        ends = []
        for cut in cuts:
            if cut is None:
                flat += next(encoded).ids
            else:
                flat += self.fim.arrange(*(next(encoded).ids for _ in cut))
            flat.append(self.eos)
            ends.append(len(flat))
        return _Batch(
            np.array(flat, self.dtype),
            np.diff(ends, prepend=0),
            np.array(held_out, bool),
            np.array([len(r) for r in raw], np.int64),
        )


class _Writer:
    """Appends batches to the files of both splits; `finish` makes them whole on disk."""

    def __init__(self, folder: Path, vocab_size: int, valid_fraction: float) -> None:
        self.folder, self.valid_fraction = folder, valid_fraction
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.lengths: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self.sizes: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}

    def write(self, batch: _Batch) -> None:
        keep = batch.lengths > 1  # some tokenizers make nothing of some texts, such as white space
        for split, chosen in zip(SPLITS, (keep & ~batch.held_out, keep & batch.held_out), strict=True):
            with open(self._tokens(split), "ab") as file:
                file.write(batch.tokens[np.repeat(chosen, batch.lengths)].tobytes())
            self.lengths[split].append(batch.lengths[chosen])
            self.sizes[split].append(batch.sizes[chosen])

    def finish(self, name: str) -> None:
        lengths = {split: np.concatenate([np.empty(0, np.int64), *self.lengths[split]]) for split in SPLITS}
        sizes = {split: np.concatenate([np.empty(0, np.int64), *self.sizes[split]]) for split in SPLITS}
        documents = sum(len(lengths[split]) for split in SPLITS)
        if not documents:
            raise UserError(f"{name} holds no documents; check the path and that they are not empty")
        if not len(lengths["train"]):
            self._move_last("valid", "train", lengths, sizes)
        if self.valid_fraction and not len(lengths["valid"]) and documents > 1:
            self._move_last("train", "valid", lengths, sizes)
        index: dict = {"dtype": self.dtype.name}
        for split in SPLITS:
            self._tokens(split).touch()
            offsets = np.concatenate([[0], np.cumsum(lengths[split])]).astype(np.int64)
            np.save(self.folder / f"{split}.offsets.npy", offsets)
            index[split] = {
                "documents": len(lengths[split]),
                "tokens": int(offsets[-1]),
                "bytes": int(sizes[split].sum()),
            }
        (self.folder / "index.json").write_text(json.dumps(index, indent=1))
        for path in self.folder.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    def _tokens(self, split: str) -> Path:
        return self.folder / f"{split}.tokens"

    def _move_last(self, source: str, target: str, lengths: dict, sizes: dict) -> None:
        count = int(lengths[source][-1]) * self.dtype.itemsize
        with open(self._tokens(source), "r+b") as file:
            file.seek(-count, os.SEEK_END)
            self._tokens(target).write_bytes(file.read())
            file.seek(-count, os.SEEK_END)
            file.truncate()
        for column in (lengths, sizes):
            column[source], column[target] = column[source][:-1], column[source][-1:]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _in_parallel(encoder: _Encoder, batches: Iterator[list[str]], workers: int) -> Iterator[_Batch]:
    """Encoded batches in order, with few enough under way that memory stays flat.

    Threads rather than processes: tokenizers releases the GIL, texts need no copying, and forking a process
    that has used torch or tokenizers is unsafe.
    """
    with _one_thread_a_call(), ThreadPoolExecutor(workers) as pool:
        under_way: deque = deque()
        try:
            for batch in batches:
                under_way.append(pool.submit(encoder, batch))
                if len(under_way) > 2 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


@contextmanager
def _one_thread_a_call() -> Iterator[None]:
    """Keep tokenizers from using every core in each call; the threads above decide how many work."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _progress(batches: Iterator[_Batch], name: str) -> Iterator[_Batch]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    documents = tokens = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"tokenising {name}")
        for batch in batches:
            documents += len(batch.lengths)
            tokens += len(batch.tokens)
            progress.update(task, description=f"tokenising {name}: {documents:,} documents, {tokens:,} tokens")
            yield batch
