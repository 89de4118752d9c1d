"""Token shards: a source's documents as one memory-mapped file of tokens, made in parallel, reused when unchanged.

CACHE/FINGERPRINT/
    train.tokens            uint16, or uint32 above 65 536 tokens; every document ends with the end-of-text token,
                            but for parts of a document whose other parts are in the other split
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
from rorqual.data.heldout import SPLITS, Encoded, Writer
from rorqual.data.special_tokens import framed_as_special
from rorqual.data.text_pieces import pieces
from rorqual.errors import UserError, file_error
from rorqual.files import read_json
from rorqual.recipe import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 3
BATCH_PIECES, BATCH_CHARACTERS = 1024, 1 << 20
PIECE = 1 << 16  # characters; longer documents are tokenised, and held out, in pieces

Piece = tuple[str, bool]  # text, and whether it is the last of its document


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
    every seed; one above `PIECE` characters piece by piece, so that the share holds for bytes as for documents. If that
    holds out none, though some are asked for, the last document is taken, or the end of it where it is the only one or
    much longer than the share. What is held out by hash is never rearranged by `fim`. Names of special tokens in a
    document are text. Raises UserError for unreadable or empty sources and when the disk is full.
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
            writer = Writer(partial, len(tokenizer), valid_fraction)
            encoder = _Encoder(backend, tokenizer.eos_token_id, writer.dtype, valid_fraction, fim)
            batches = _batches(read_texts(source))
            for batch in _progress(_in_parallel(encoder, batches, workers), source.path):
                writer.write(batch)
            writer.finish(source.path)
            partial.rename(packed)
        except OSError as e:
            raise file_error(packed, e, then="or choose another place") from e
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return {split: _map(packed, split) for split in SPLITS}


def read_index(packed: Path) -> dict:
    path, then = packed / "index.json", f"delete {packed} to have it made again"
    try:
        return read_json(path, then)
    except FileNotFoundError as e:
        raise file_error(path, e, "read", f"or {then}") from e


def _map(packed: Path, split: str) -> Documents:
    index = read_index(packed)
    path = packed / f"{split}.tokens"
    try:
        offsets = np.load(packed / f"{split}.offsets.npy", allow_pickle=False)
        tokens = np.memmap(path, dtype=index["dtype"], mode="r") if offsets[-1] else np.empty(0, index["dtype"])
    except OSError as e:
        raise file_error(e.filename or path, e, "read", f"or delete {packed} to have it made again") from e
    except Exception as e:  # numpy reads the header by Python's own tokenizer and raises whatever that does
        raise UserError(f"{path} is damaged ({e}); delete {packed} to have it made again") from e
    if len(tokens) != offsets[-1]:
        raise UserError(f"{path} holds {len(tokens)} tokens, not {offsets[-1]}; delete {packed} to have it made again")
    return Documents(tokens, offsets)


class _Encoder:
    """Turns a list of pieces into Encoded. Called from several threads: the Rust side works without the GIL."""

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

    def __call__(self, batch: list[Piece]) -> Encoded:
        raw = [text.encode() for text, _ in batch]
        held_out = [int.from_bytes(blake2b(r, digest_size=8).digest(), "little") < self.threshold for r in raw]
        texts: list[str] = []
        cuts = []
        for (text, _), held in zip(batch, held_out, strict=True):
            cut = None if held or self.fim is None else self.fim.cut(text)
            cuts.append(cut)
            texts.extend(cut or (text,))
        encoded = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        parts: list[np.ndarray] = []
        # What is rearranged ends with its middle, whatever came after it in the document.
        last = [ends or cut is not None for (_, ends), cut in zip(batch, cuts, strict=True)]
        for cut, ends in zip(cuts, last, strict=True):
            ids = next(encoded).ids if cut is None else self.fim.arrange(*(next(encoded).ids for _ in cut))
            parts.append(np.array([*ids, self.eos] if ends else ids, self.dtype))
        return Encoded(np.concatenate(parts), [len(part) for part in parts], [len(r) for r in raw], held_out, last)


def _batches(texts: Iterable[str]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for text in texts:
        left = len(text)
        for piece in pieces(text, PIECE):
            left -= len(piece)
            batch.append((piece, left == 0))
            characters += len(piece)
            if len(batch) == BATCH_PIECES or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _in_parallel(encoder: _Encoder, batches: Iterator[list[Piece]], workers: int) -> Iterator[Encoded]:
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


def _progress(batches: Iterator[Encoded], name: str) -> Iterator[Encoded]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    documents = tokens = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"tokenising {name}")
        for batch in batches:
            documents += sum(batch.last)
            tokens += len(batch.tokens)
            progress.update(task, description=f"tokenising {name}: {documents:,} documents, {tokens:,} tokens")
            yield batch
