"""The console of standard output."""

import os

from rich.console import Console

UNLIMITED = 10_000  # columns


def output(highlight: bool = False) -> Console:
    """A console that fits tables to the terminal; into a file or a pipe they are as wide as they need to be, but for
    COLUMNS in the environment.
    """
    console = Console(highlight=highlight)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNLIMITED
    return console
