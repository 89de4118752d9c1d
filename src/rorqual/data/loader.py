"""Batches of packed rows: shuffled, mixed by source weight, exactly resumable.

Shapes: B rows of a batch, T sequence length, V vocabulary size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from rorqual.data.packing import pack, ranges
from rorqual.data.token_shards import Documents
from rorqual.errors import UserError
from rorqual.strict_json import Json
from rorqual.tokenizer_protocol import Tokenizer

PADDING = -1  # document id of padding positions


@dataclass(frozen=True)
class Batch:
    """`targets`: the next token of each input; `weights`: its loss weight, 0 across documents and without loss."""

    inputs: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64
    weights: Tensor  # [B, T] float32
    positions: Tensor  # [B, T] int64; restart at each document where documents are isolated
    documents: Tensor | None  # [B, T] int64, index of the document within its row; None: not isolated

    def to(self, device: torch.device) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value if value is None else value.to(device) for name, value in values.items()})

    @property
    def attention_mask(self) -> Tensor | None:
        """bool [B, 1, T, T], true where a token attends: causally, within its document. None: causally in the row."""
        if self.documents is None:
            return None
        length = self.documents.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.documents.device).tril()
        return ((self.documents[:, :, None] == self.documents[:, None, :]) & causal)[:, None]

    def following(self, depth: int) -> Tensor:
        """The tokens [B, T] that come `depth` after the inputs; anything past the end."""
        return self.inputs.roll(-depth, dims=1)

    def ahead(self, depth: int) -> tuple[Tensor, Tensor]:
        """Targets and weights [B, T], `depth` tokens after the next; weight 0 past the end or in another document."""
        if not depth:
            return self.targets, self.weights
        targets, weights = self.targets.roll(-depth, dims=1), self.weights.roll(-depth, dims=1)
        weights[:, -depth:] = 0
        if self.documents is not None:
            weights = weights * (self.documents == self.documents.roll(-depth, dims=1))
        return targets, weights


class PackedDataset:
    """Documents packed into rows of T + 1 tokens.

    `isolate` sets `Batch.documents` (the document mask); `whole` never cuts a document that fits a row.
    """

    def __init__(
        self,
        documents: Documents,
        sequence_length: int,
        padding_token: int,
        isolate: bool = False,
        whole: bool = False,
    ) -> None:
        self.documents, self.length = documents, sequence_length
        self.padding_token, self.isolate = padding_token, isolate
        starts, lengths, row_of = pack(documents.offsets, sequence_length + 1, whole)
        order = np.argsort(row_of, kind="stable")
        self.starts, self.lengths = starts[order], lengths[order]
        self.first = np.concatenate([[0], np.cumsum(np.bincount(row_of))])  # segments of row r: first[r]:first[r + 1]

    def __len__(self) -> int:
        return len(self.first) - 1

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows with these indices."""
        size, width = len(rows), self.length + 1
        counts = self.first[rows + 1] - self.first[rows]
        segments = ranges(self.first[rows], counts)
        lengths = self.lengths[segments]
        places = ranges(self.starts[segments], lengths)  # in the file
        row_of = np.repeat(np.arange(size), counts)
        filled = np.bincount(row_of, weights=lengths, minlength=size).astype(np.int64)
        cells = ranges(np.arange(size) * width, filled)  # in the batch
        heads = cells[np.cumsum(lengths) - lengths]

        def grid(fill: int, dtype: type, values: ArrayLike) -> np.ndarray:
            out = np.full(size * width, fill, dtype)
            out[cells] = values
            return out

        tokens = grid(self.padding_token, np.int64, self.documents.tokens[places])
        own = self.documents.weights
        weights = grid(0, np.float32, 1 if own is None else own[places])
        weights[heads] = 0  # the token before a segment's first is another document's
        inside = ranges(np.zeros_like(lengths), lengths)
        documents = None
        if self.isolate:
            documents = grid(PADDING, np.int64, np.repeat(ranges(np.zeros_like(counts), counts), lengths))
            positions = grid(0, np.int64, inside)
        else:
            positions = np.tile(np.arange(width), size)

        def side(array: np.ndarray, targets: bool = False) -> Tensor:
            square = array.reshape(size, width)
            return torch.from_numpy(np.ascontiguousarray(square[:, 1:] if targets else square[:, :-1]))

        return Batch(
            inputs=side(tokens),
            targets=side(tokens, targets=True),
            weights=side(weights, targets=True),
            positions=side(positions),
            documents=None if documents is None else side(documents),
        )


class Loader:
    """Endless batches from several sources; a fraction `weights[s]` (normalised) of the rows is from source s.

    Each source is shuffled anew every epoch; the order depends only on the seed, the source's index and the epoch, so
    `state_dict()` is just the number of rows drawn from each.
    """

    def __init__(self, sources: list[PackedDataset], weights: list[float], seed: int) -> None:
        self.sources, self.seed = sources, seed
        self.shares = np.array(weights, np.float64) / sum(weights)
        self.drawn = np.zeros(len(sources), np.int64)
        self._identity = _identity(sources, self.shares, seed)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # source → (epoch, its order)

    @property
    def rows(self) -> int:
        """Rows of all sources together, one epoch of a mixture."""
        return sum(len(source) for source in self.sources)

    @property
    def epoch(self) -> float:
        """Rows drawn so far, in epochs."""
        return int(self.drawn.sum()) / self.rows

    def next(self, batch_size: int) -> Batch:
        """The next `batch_size` rows; the size may differ between calls."""
        chosen: list[list[int]] = [[] for _ in self.sources]
        for place, source in enumerate(self._choose(batch_size)):
            chosen[source].append(place)
        parts = [
            (places, source.batch(self._take(number, len(places))))
            for number, (source, places) in enumerate(zip(self.sources, chosen, strict=True))
            if places
        ]
        return parts[0][1] if len(parts) == 1 else _interleave(parts, batch_size)

    def state_dict(self) -> dict[str, Json]:
        """The position, JSON-able."""
        return {"data": self._identity, "drawn": [int(count) for count in self.drawn]}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Restore a position. Raises UserError when it is of other data, sequence length, mixture or seed."""
        if state.get("data") != self._identity:
            raise UserError(
                "the checkpoint was made with other data, sequence_length, source weights or seed than the recipe's; "
                "restore them or start a new run"
            )
        self.drawn = np.array(state["drawn"], np.int64)

    def _choose(self, count: int) -> list[int]:
        """Source of each of the next rows: the one furthest below its share, so proportions hold at every step."""
        drawn = self.drawn.astype(np.float64)
        out: list[int] = []
        for total in range(int(self.drawn.sum()) + 1, int(self.drawn.sum()) + count + 1):
            source = int(np.argmax(self.shares * total - drawn))
            drawn[source] += 1
            out.append(source)
        return out

    def _take(self, source: int, count: int) -> np.ndarray:
        size = len(self.sources[source])
        out: list[np.ndarray] = []
        while count:
            epoch, start = divmod(int(self.drawn[source]), size)
            if self._orders.get(source, (None,))[0] != epoch:
                order = np.random.default_rng([self.seed, source, epoch]).permutation(size)
                self._orders[source] = (epoch, order)
            taken = self._orders[source][1][start : start + count]
            self.drawn[source] += len(taken)
            count -= len(taken)
            out.append(taken)
        return np.concatenate(out)


def _identity(sources: list[PackedDataset], shares: np.ndarray, seed: int) -> str:
    """A hash that differs for loaders with different batches, without reading all tokens."""
    digest = blake2b(repr((seed, shares.tolist())).encode(), digest_size=8)
    for source in sources:
        digest.update(repr((source.length, source.isolate, len(source.documents))).encode())
        digest.update(source.lengths.tobytes())
        digest.update(source.documents.tokens[: 1 << 16].tobytes())
    return digest.hexdigest()


def _interleave(parts: list[tuple[list[int], Batch]], size: int) -> Batch:
    """One batch from several, each with the row indices it takes."""
    order = torch.empty(size, dtype=torch.int64)
    order[torch.tensor([place for places, _ in parts for place in places])] = torch.arange(size)

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for _, batch in parts])[order]

    isolated = parts[0][1].documents is not None
    return Batch(
        inputs=joined("inputs"),
        targets=joined("targets"),
        weights=joined("weights"),
        positions=joined("positions"),
        documents=joined("documents") if isolated else None,
    )


class Heldout:
    """Held-out rows of all sources in a fixed order, with the bytes of text in their targets."""

    def __init__(
        self, sources: list[PackedDataset], bytes_of_token: np.ndarray, weights: list[float] | None = None
    ) -> None:
        """bytes_of_token [V]; weights: of the sources in the mixture, None: equal."""
        self.sources = sources
        self.bytes_of_token = torch.from_numpy(bytes_of_token)
        weights = weights or [1.0] * len(sources)
        self.shares = np.array(weights, np.float64) / sum(weights)

    @property
    def rows(self) -> int:
        return sum(len(source) for source in self.sources)

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[tuple[Batch, int]]:
        """Pairs (batch, UTF-8 bytes of its targets of non-zero weight).

        Without `limit`, every row once. With it, at most `limit` batches sample the mixture: each source in proportion
        to its weight, at least one row of each, and rows repeat where a source has too few. Bits per byte are the
        summed negative log-probabilities / ln 2 / summed bytes.
        """
        source, row = self._order(None if limit is None else limit * batch_size)
        for start in range(0, len(source), batch_size):
            chosen, rows = source[start : start + batch_size], row[start : start + batch_size]
            parts = [
                (places.tolist(), self.sources[number].batch(rows[places]))
                for number in range(len(self.sources))
                if len(places := np.flatnonzero(chosen == number))
            ]
            batch = parts[0][1] if len(parts) == 1 else _interleave(parts, len(chosen))
            yield batch, int((self.bytes_of_token[batch.targets] * (batch.weights > 0)).sum())

    def _order(self, most: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(source, row) indices, the sources interleaved in proportion to their weights."""
        lengths = np.array([len(source) for source in self.sources])
        counts = lengths
        if most is not None:
            # No more than one pass over the source that is largest relative to its weight.
            total = min(float(most), float((lengths / self.shares).max()))
            counts = np.maximum(1, np.floor(total * self.shares + 0.5).astype(np.int64))
            while counts.sum() > max(most, len(counts)):
                counts[counts.argmax()] -= 1
        source = np.repeat(np.arange(len(counts)), counts)
        place = ranges(np.zeros_like(counts), counts)
        # Rows are sorted by document length; a sample must not consist of long documents only.
        orders = [np.random.default_rng(0).permutation(length) for length in lengths]
        row = np.concatenate([orders[s][np.arange(n) % lengths[s]] for s, n in enumerate(counts)])
        turn = np.argsort((place + 0.5) / counts[source], kind="stable")
        return source[turn], row[turn]


def bytes_of_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """int64 [V]: UTF-8 bytes of each token's text in byte-level or SentencePiece-style BPE; 0 for special tokens."""
    byte_level = '"ByteLevel"' in tokenizer.backend_tokenizer.to_str()
    added = tokenizer.added_tokens_decoder
    out = np.zeros(max(tokenizer.get_vocab().values()) + 1, np.int64)
    for token, number in tokenizer.get_vocab().items():
        if number in added:
            out[number] = 0 if added[number].special else len(token.encode())
        elif byte_level:
            out[number] = len(token)  # each byte is written as one character
        elif len(token) == 6 and token.startswith("<0x"):
            out[number] = 1
        else:
            out[number] = len(token.replace("▁", " ").encode())
    return out
