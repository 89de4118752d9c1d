"""Write a model that is spread over processes to one Hugging Face directory: each writes the tensors it holds."""

from pathlib import Path

from rorqual.checkpoint.huggingface import write_settings
from rorqual.checkpoint.model_writer import new_directory, write_index
from rorqual.checkpoint.release_tensors import own_tensors, shared_copies
from rorqual.checkpoint.safetensors_io import write_shard
from rorqual.model import Transformer
from rorqual.parallel.data import is_expert
from rorqual.parallel.experts import first_expert
from rorqual.parallel.mesh import Mesh
from rorqual.tokenizer_protocol import Tokenizer


def save_parts(model: Transformer, path: Path, tokenizer: Tokenizer | None, mesh: Mesh) -> None:
    """As checkpoint.huggingface.save_model, by all processes together.

    Of what several processes hold alike, the first writes it. Raises UserError if the directory cannot be written.
    """
    file = f"model-{mesh.rank + 1:05d}-of-{mesh.section.processes:05d}.safetensors"
    tensors = own_tensors(model, first_expert=first_expert(model, mesh)) | shared_copies(model)
    places = {True: mesh.replicas.place, False: mesh.tokens.place}
    tensors = {name: t for name, t in tensors.items() if places[is_expert(name)] == 0}
    temporary = path.with_name(f".parts-{path.name}")
    if mesh.rank == 0:
        temporary.mkdir(parents=True, exist_ok=True)
    mesh.world.barrier("export")
    if tensors:
        write_shard(temporary / file, tensors)
    mesh.world.barrier("export")
    if mesh.rank == 0:
        with new_directory(path, "saved") as folder:
            for part in temporary.iterdir():
                part.rename(folder / part.name)
            temporary.rmdir()
            write_index(folder)
            write_settings(model, folder, tokenizer)
    mesh.world.barrier("export")
