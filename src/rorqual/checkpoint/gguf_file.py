"""Read GGUF files, llama.cpp's format: a header of named values, then tensors, which are read on request.

The header is not read by the gguf library, whose reader maps the whole file (the pages count as this process's memory),
keeps hundreds of bytes for every token and reads past the end of a damaged file. Dequantisation is the library's.
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize
from torch import Tensor

from rorqual.errors import UserError
from rorqual.strict_json import Json

HEADER_BYTES = 64 << 20  # at most; that of V3 with its 129 280 tokens has 8 MB
CODES = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's location. `rows`: the product of all dimensions but the last, along which its blocks run."""

    path: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # outermost first, as torch has it
    start: int  # byte in the file

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        numbers, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // numbers * size

    def blocks(self, first: int, last: int) -> np.ndarray:
        """Rows [first, last) as stored: uint8 [n, bytes of a row]. Raises ValueError for a truncated file."""
        data = np.empty((last - first, self.row_bytes), np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + first * self.row_bytes)
            if file.readinto(data.data) != data.nbytes:
                raise ValueError(f"it ends inside tensor {self.name}")
        return data

    def expand(self, blocks: np.ndarray) -> Tensor:
        """Dequantise rows as llama.cpp does → fp32 [n, K]. Raises UserError for values that are not finite."""
        # As one row: the library takes rows by sixteens, which costs more than the arithmetic.
        with np.errstate(all="ignore"):  # values that are not finite are refused below
            values = torch.from_numpy(dequantize(blocks.reshape(1, -1), self.kind)).view(len(blocks), -1)
        if not values.isfinite().all():
            raise UserError(f"tensor {self.name} holds numbers that are not finite; fetch the file again")
        return values


def open_gguf(path: str | Path) -> tuple[dict[str, Json], dict[str, GGUFTensor]]:
    """The header's values and the tensors, by name; of all parts if the file is the first of several.

    Raises UserError for a part that is missing or not the first, ValueError and OSError for a damaged file.
    """
    path = Path(path)
    fields, tensors = _read(path)
    parts = fields.get("split.count", 1)
    if parts == 1:
        return fields, tensors
    found = re.fullmatch(r"(.*-)00001(-of-\d{5}\.gguf)", path.name, re.IGNORECASE)
    if not found or type(parts) is not int:
        raise UserError(f"it is one of {parts} parts; give the first, whose name ends in -00001-of-{parts:05}.gguf")
    for number in range(2, parts + 1):
        part = path.with_name(f"{found[1]}{number:05}{found[2]}")
        if not part.is_file():
            raise UserError(f"part {part.name} is missing; fetch it into the same directory")
        tensors |= _read(part)[1]
    return fields, tensors


def _read(path: Path) -> tuple[dict[str, Json], dict[str, GGUFTensor]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = _Header(file, size)
        if header.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = header.uint32()
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, not 2 or 3 in the byte order of this machine")
        tensors, values = header.uint64(), header.uint64()
        fields: dict[str, Json] = {}
        for _ in range(values):
            name, kind = header.string(), GGUFValueType(header.uint32())
            fields[name] = header.value(kind)
        described = [header.tensor() for _ in range(tensors)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    data = -(-header.position // alignment) * alignment
    stored: dict[str, GGUFTensor] = {}
    for name, kind, shape, start in described:
        tensor = GGUFTensor(path, name, kind, shape, data + start)
        if name in stored:
            raise ValueError(f"tensor {name} occurs twice")
        if 0 in shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"tensor {name} of type {kind.name} cannot have the shape {list(shape)}")
        if tensor.start + tensor.rows * tensor.row_bytes > size:
            raise ValueError(f"it ends inside tensor {name}")
        stored[name] = tensor
    return fields, stored


class _Header:
    """Reads the header's values in order, never past its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.position, self.end = file, 0, min(size, HEADER_BYTES)

    def take(self, count: int) -> bytes:
        if count > self.end - self.position:
            raise ValueError("it ends too early")
        self.position += count
        return self.file.read(count)

    def uint32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def uint64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def number(self, kind: GGUFValueType) -> int | float:
        code = "<" + CODES[kind]
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.uint64()).decode()

    def value(self, kind: GGUFValueType) -> Json:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.number(kind)
        kind, count = GGUFValueType(self.uint32()), self.uint64()
        if kind in CODES:
            numbers = np.frombuffer(self.take(count * struct.calcsize("<" + CODES[kind])), "<" + CODES[kind])
            return numbers.tolist()
        return [self.value(kind) for _ in range(count)]

    def tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        """A tensor's name, type, shape and offset after the header."""
        name, dimensions = self.string(), self.uint32()
        if not name.isprintable():
            raise ValueError("a tensor's name is damaged")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self.uint64() for _ in range(dimensions))[::-1]
        kind = GGMLQuantizationType(self.uint32())
        return name, kind, shape, self.uint64()
