"""Write a model directory: configuration, shards with their index, tokenizer."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from rorqual.checkpoint.safetensors_io import INDEX, WEIGHTS, read_header, write_shard
from rorqual.errors import file_error
from rorqual.files import force_to_disk, write_folder
from rorqual.model.release_settings import GENERATION
from rorqual.tokenizer_protocol import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000
# Files besides weights and config.json, copied unchanged.
COMPANION_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", GENERATION,
)  # fmt: skip
TEMPLATES = "additional_chat_templates"  # a directory of named templates


@contextmanager
def new_directory(path: Path, done: str = "written") -> Iterator[Path]:
    """An empty directory to fill, which becomes `path` where the block ends without an error.

    A new directory appears complete or not at all. In an existing one, files are replaced atomically one by one, and
    files of other names stay. Raises UserError, with what was to be `done`, for an OSError, with nothing changed.
    """
    try:
        with write_folder(path, _move_into_place) as folder:
            yield folder
    except OSError as e:
        raise file_error(path, e, done, "or choose another directory") from e


def _move_into_place(folder: Path, path: Path) -> None:
    if not path.exists():
        folder.rename(path)
        return
    new = {file.name for file in folder.iterdir()}
    old = {INDEX, *(file.name for file in path.glob("model*.safetensors"))}
    for name in sorted(new, key=lambda n: n == INDEX):  # the index last, after the shards that it names
        if (path / name).is_dir():  # the templates'
            shutil.rmtree(path / name)
        os.replace(folder / name, path / name)
    for name in old - new:  # shards of a former layout
        (path / name).unlink(missing_ok=True)
    force_to_disk(path)


def copy_companions(source: Path, dest: Path) -> None:
    """Copy tokenizer, templates and generation config unchanged."""
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, dest / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, dest / TEMPLATES, dirs_exist_ok=True)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_weights(tensors: dict[str, Tensor], path: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, t in tensors.items():
        if shards[-1] and size + t.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += t.nbytes
    if len(shards) == 1:
        write_shard(path / WEIGHTS, shards[0])
        return
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_shard(path / file, shard)
        places |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def write_index(path: Path) -> None:
    """The index of all shards in a directory."""
    found = {file.name: read_header(file) for file in sorted(path.glob("*.safetensors"))}
    total = sum(entry.row_bytes * entry.shape[0] for entries in found.values() for entry in entries.values())
    places = {name: file for file, entries in found.items() for name in entries}
    write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """`tokenizer.json`, `tokenizer_config.json` and any `chat_template.jinja`. Raises OSError."""
    try:
        tokenizer.save_pretrained(str(path))
        # transformers 5 writes a class name that version 4 does not know; both know this one.
        config = path / "tokenizer_config.json"
        config.write_text(config.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    except OSError:
        raise
    except Exception as e:  # the Rust side reports a full disk as a bare Exception
        raise OSError(str(e)) from e
