"""rorqual import and doctor."""

from pathlib import Path
from typing import Annotated

import typer

from rorqual import strict_json
from rorqual.cli.options import AsJson, expand_path, find_model
from rorqual.local_paths import local_path


def import_(
    source: Annotated[
        str, typer.Argument(help="smollm2, a .gguf file, a Hugging Face directory, or a LoRA adapter's, to merge it")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="the directory to write")],
) -> None:
    """Import a model as a Hugging Face directory."""
    from rorqual.adapters.peft_files import base_of, import_adapter, is_adapter
    from rorqual.checkpoint.gguf_import import import_model

    destination, path = expand_path(destination), local_path(source)
    if is_adapter(path):
        import_adapter(path, destination, find_model(base_of(path)))
    else:
        import_model(path, destination)
    print(f"{destination}: a Hugging Face directory; try: rorqual chat {destination}")


def doctor(as_json: AsJson = False) -> None:
    """Show the kernels, dtype and threads that this machine uses, and why. RORQUAL_CPU selects a lower CPU class."""
    from rorqual.plan.hardware import diagnose

    found = diagnose()
    if as_json:
        print(strict_json.dumps(dict(found)))
        return
    for part, sentence in found:
        print(f"{part:<40} {sentence}")
