"""The tensors of a checkpoint in the files of several processes, read by any number of them.

state.json has for each file its CRC-32 and, for tensors of which it holds some rows, how many there are in all and
which is the first; other tensors are whole.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rorqual.parallel.data import Slice

CHUNK_BYTES = 1 << 22  # per read


class Damaged(Exception):
    """A checkpoint's content is not what was written."""


def crc32(path: Path) -> int:
    """By plain reads: a failing disk raises OSError, where a memory map would kill the process."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            value = zlib.crc32(piece, value)
    return value


def write_part(folder: Path, file: str, tensors: dict[str, Tensor], slices: Mapping[str, Slice]) -> None:
    """The tensors, and FILE.json with what state.json will say of them."""
    save_file(tensors, folder / file)
    cut = {name: [slices[name].shape[0], slices[name].first] for name in tensors if name in slices}
    (folder / f"{file}.json").write_text(json.dumps({"crc32": crc32(folder / file), "rows": cut}))


def take_descriptions(folder: Path) -> dict[str, Any]:
    """What `write_part` said of each file; the descriptions are removed."""
    found = {}
    for path in sorted(folder.glob("*.safetensors.json")):
        found[path.name.removesuffix(".json")] = json.loads(path.read_text())
        path.unlink()
    return found


def read_parts(folder: Path, parts: Mapping[str, Any], slices: Mapping[str, Slice] | None = None) -> dict[str, Tensor]:
    """All tensors by name: with `slices` those rows of the tensors named there, else whole.

    Raises Damaged where rows are missing.
    """
    found: dict[str, Tensor] = {}
    missing: dict[str, int] = {}  # rows, of the tensors that are cut
    for file, part in parts.items():
        with safe_open(folder / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 -- not a dictionary
                if name not in part["rows"]:
                    found.setdefault(name, opened.get_tensor(name))
                    continue
                total, first = part["rows"][name]
                piece = opened.get_slice(name)
                rows, *rest = piece.get_shape()
                wanted = range(slices[name].first, slices[name].last) if slices and name in slices else range(total)
                start, stop = max(first, wanted.start), min(first + rows, wanted.stop)
                missing.setdefault(name, len(wanted))
                if start >= stop:
                    continue
                values = piece[start - first : stop - first]
                if name not in found:
                    found[name] = torch.empty(len(wanted), *rest, dtype=values.dtype)
                found[name][start - wanted.start : stop - wanted.start] = values
                missing[name] -= stop - start
    for name, rows in missing.items():
        if rows:
            raise Damaged(f"rows of {name} are missing")
    return found
