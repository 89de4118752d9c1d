"""rorqual import and doctor."""

from pathlib import Path
from typing import Annotated

import typer

from rorqual import strict_json
from rorqual.cli.options import AsJson, expand_path
from rorqual.local_paths import local_path


def import_(
    source: Annotated[str, typer.Argument(help="smollm2, a .gguf file, or a Hugging Face directory")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="the directory to write")],
) -> None:
    """Import a model as a Hugging Face directory."""
    from rorqual.checkpoint.gguf_import import import_model

    destination = expand_path(destination)
    import_model(local_path(source), destination)
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
