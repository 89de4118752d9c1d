"""Read and write safetensors files, a few megabytes at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name → dtype, shape, first and last
byte), and the tensors' bytes. Plain reads instead of the library's memory map, whose pages count as this process's
memory, and writes without assembling a shard: loading and saving need no second copy.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.errors import UserError
from rorqual.kernels.dtype_names import SAFETENSORS, SAFETENSORS_CODES
from rorqual.model.model_directory import foreign, unreadable
from rorqual.strict_json import Json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # of a model in one file, and in several
CHUNK_BYTES = 8 << 20
MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's location in a file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def rows(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of the tensor. Raises UserError for a truncated file."""
        last = self.shape[0] if last is None else min(last, self.shape[0])
        buffer = bytearray((last - first) * self.row_bytes)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start + first * self.row_bytes)
                length = file.readinto(buffer)
        except OSError as e:
            raise unreadable(self.path, e) from None
        if length != len(buffer):
            raise UserError(f"{self.path} ends inside tensor {self.name}; the file is truncated, fetch it again")
        flat = torch.frombuffer(buffer, dtype=self.dtype) if buffer else torch.empty(0, dtype=self.dtype)
        return flat.view(last - first, *self.shape[1:])


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by name. Raises UserError if it is missing, truncated or damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or MAX_HEADER_BYTES >= length > size - 8:
                raise ValueError("it ends inside its header: the download was cut short")
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header is longer than it can be")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    except OSError as e:
        raise unreadable(path, e) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(foreign(path) or f"{path} is not a valid safetensors file ({e}); fetch it again") from None
    for t in tensors.values():
        if t.start + math.prod(t.shape) * t.dtype.itemsize > size:
            raise UserError(f"{path} ends inside tensor {t.name}; the file is truncated, fetch it again")
    return tensors


def _entry(path: Path, name: str, entry: dict[str, Any], data: int) -> TensorEntry:
    if entry["dtype"] not in SAFETENSORS:
        raise ValueError(f"tensor {name} has the unknown dtype {entry['dtype']!r}")
    if not name.isprintable():
        raise ValueError("a tensor's name is damaged")
    shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise ValueError(f"tensor {name} has an invalid shape or offset")
    dtype = SAFETENSORS[entry["dtype"]]
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} has {last - first} bytes, which do not fit its shape {list(shape)}")
    return TensorEntry(path, name, dtype, shape or (1,), data + first)


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors (at least one dimension each) to a new safetensors file."""
    header: dict[str, dict[str, Json]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        header[name] = {"dtype": SAFETENSORS_CODES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors' bytes are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            rows = max(1, CHUNK_BYTES * t.shape[0] // max(1, t.nbytes))
            for chunk in t.detach().split(rows):
                # A copy: NumPy fixes the size of the memory it shares, and fully sharded layers free theirs.
                file.write(chunk.to("cpu", copy=True).contiguous().flatten().view(torch.uint8).numpy().data)
