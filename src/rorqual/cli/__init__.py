"""The commands of `rorqual`."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`main` and the search for a model stood here before; they load on first use."""
    if name == "main":
        from rorqual.cli.entry import main

        return main
    if name == "_directory":
        from rorqual.cli.options import find_model

        return find_model
    raise AttributeError(f"module 'rorqual.cli' has no attribute {name!r}")
