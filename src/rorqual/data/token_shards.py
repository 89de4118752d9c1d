"""Token shards: a source's documents as memory-mapped token files, tokenised in parallel and cached.

CACHE/FINGERPRINT/
    train.tokens            uint16, or uint32 for vocabularies above 65 536; every document ends with the
                            end-of-text token, except parts of a document that is in both splits
    train.offsets.npy       int64 [documents + 1]: document d is tokens[offsets[d]:offsets[d + 1]]
    valid.tokens, valid.offsets.npy
    index.json              dtype, and for each split its documents, tokens and UTF-8 bytes
"""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from rorqual.data.corpus import describe, read_texts
from rorqual.data.fim import FillInTheMiddle
from rorqual.data.heldout import SPLITS, EncodedBatch, ShardWriter
from rorqual.data.special_tokens import framed_as_special
from rorqual.data.text_pieces import split_text
from rorqual.errors import UserError, file_error
from rorqual.files import read_json, write_folder
from rorqual.recipe import Source
from rorqual.tokenizer_protocol import Tokenizer

FORMAT = 3
BATCH_CHUNKS, BATCH_CHARACTERS = 1024, 1 << 20
CHUNK_CHARACTERS = 1 << 16  # longer documents are tokenised, and held out, in chunks

Chunk = tuple[str, bool]  # text, and whether it is the last of its document


@dataclass(frozen=True)
class Documents:
    """Tokenised documents of at least two tokens each.

    tokens: [N]; offsets: int64 [documents + 1]; weights: [N], loss weight of each token as a target, None for 1.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pack_source(
    source: Source,
    tokenizer: Tokenizer,
    cache: Path,
    valid_fraction: float = 0.0,
    fim: FillInTheMiddle | None = None,
    workers: int = 1,
) -> dict[str, Documents]:
    """Tokenise one source into `cache` unless it is there; memory-map its splits `train` and `valid`.

    A document is held out by a hash of its text, so copies of it are in one split, the same for every seed; documents
    above `CHUNK_CHARACTERS` chunk by chunk, so that the fraction holds for bytes too. Where the hash holds out none,
    the last document is held out, or its end where it is the only one or much longer than the fraction. `fim` never
    rearranges text held out by hash. Special-token names in a document are text. Raises UserError for unreadable or
    empty sources and when the disk is full.
    """
    eos = end_token(tokenizer)
    backend = tokenizer.backend_tokenizer.to_str()
    identity = [FORMAT, describe(source), backend, eos, valid_fraction, repr(fim)]
    fingerprint = blake2b(json.dumps(identity).encode(), digest_size=10).hexdigest()
    packed = cache / fingerprint
    if not packed.is_dir():
        try:
            with write_folder(packed) as folder:
                writer = ShardWriter(folder, len(tokenizer), valid_fraction)
                encoder = _Encoder(backend, eos, writer.dtype, valid_fraction, fim)
                batches = _batches(read_texts(source))
                for batch in _progress(_in_parallel(encoder, batches, workers), source.path):
                    writer.write(batch)
                writer.finish(source.path)
        except OSError as e:
            raise file_error(packed, e, then="or choose another place") from e
    return {split: _map(packed, split) for split in SPLITS}


def end_token(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document. Raises UserError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token to end documents with; set it in tokenizer_config.json")
    return tokenizer.eos_token_id


def read_index(packed: Path) -> dict[str, Any]:
    """index.json of a cached source. Raises UserError where it is missing or damaged."""
    path, then = packed / "index.json", f"delete {packed} to have it rebuilt"
    try:
        found = read_json(path, then)
    except FileNotFoundError as e:
        raise file_error(path, e, "read", f"or {then}") from e
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (no JSON object); {then}")
    return found


def _map(packed: Path, split: str) -> Documents:
    index = read_index(packed)
    path = packed / f"{split}.tokens"
    try:
        offsets = np.load(packed / f"{split}.offsets.npy", allow_pickle=False)
        tokens = np.memmap(path, dtype=index["dtype"], mode="r") if offsets[-1] else np.empty(0, index["dtype"])
    except OSError as e:
        raise file_error(e.filename or path, e, "read", f"or delete {packed} to have it rebuilt") from e
    except Exception as e:  # numpy parses the header with Python's tokenizer and raises its errors
        raise UserError(f"{path} is damaged ({e}); delete {packed} to have it rebuilt") from e
    if len(tokens) != offsets[-1]:
        raise UserError(f"{path} holds {len(tokens)} tokens, not {offsets[-1]}; delete {packed} to have it rebuilt")
    return Documents(tokens, offsets)


class _Encoder:
    """Tokenises a batch of chunks. Called from several threads: the Rust side releases the GIL."""

    def __init__(
        self, backend: str, eos: int, dtype: np.dtype, valid_fraction: float, fim: FillInTheMiddle | None
    ) -> None:
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_str(framed_as_special(backend))
        self.tokenizer.encode_special_tokens = True  # special-token names in a document are text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.eos, self.dtype, self.fim = eos, dtype, fim
        self.threshold = valid_fraction * 2**64

    def __call__(self, batch: list[Chunk]) -> EncodedBatch:
        raw = [text.encode() for text, _ in batch]
        held_out = [int.from_bytes(blake2b(r, digest_size=8).digest(), "little") < self.threshold for r in raw]
        texts: list[str] = []
        cuts: list[tuple[str, str, str] | None] = []
        for (text, _), held in zip(batch, held_out, strict=True):
            cut = None if held or self.fim is None else self.fim.cut(text)
            cuts.append(cut)
            texts.extend(cut or (text,))
        encoded = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        parts: list[np.ndarray] = []
        # A rearranged chunk ends its document with the middle; later chunks of the document are documents of their own.
        last = [ends or cut is not None for (_, ends), cut in zip(batch, cuts, strict=True)]
        for cut, ends in zip(cuts, last, strict=True):
            if cut is None or self.fim is None:
                ids = next(encoded).ids
            else:
                ids = self.fim.arrange(*(next(encoded).ids for _ in cut))
            parts.append(np.array([*ids, self.eos] if ends else ids, self.dtype))
        return EncodedBatch(np.concatenate(parts), [len(part) for part in parts], [len(r) for r in raw], held_out, last)


def _batches(texts: Iterable[str]) -> Iterator[list[Chunk]]:
    batch: list[Chunk] = []
    characters = 0
    for text in texts:
        left = len(text)
        for chunk in split_text(text, CHUNK_CHARACTERS):
            left -= len(chunk)
            batch.append((chunk, left == 0))
            characters += len(chunk)
            if len(batch) == BATCH_CHUNKS or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _in_parallel(encoder: _Encoder, batches: Iterator[list[Chunk]], workers: int) -> Iterator[EncodedBatch]:
    """EncodedBatch batches in order, with a bounded number in flight so that memory stays flat.

    Threads, not processes: tokenizers releases the GIL, texts need no copying, and forking a process that has used
    torch or tokenizers is unsafe.
    """
    with _single_threaded_calls(), ThreadPoolExecutor(workers) as pool:
        in_flight: deque[Future[EncodedBatch]] = deque()
        try:
            for batch in batches:
                in_flight.append(pool.submit(encoder, batch))
                if len(in_flight) > 2 * workers:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        finally:
            for future in in_flight:
                future.cancel()


@contextmanager
def _single_threaded_calls() -> Iterator[None]:
    """Make tokenizers use one thread per call; `workers` sets the parallelism."""
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


def _progress(batches: Iterator[EncodedBatch], name: str) -> Iterator[EncodedBatch]:
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
